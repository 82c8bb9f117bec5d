// The module `mooli._gguf`: strings of GGUF metadata, which come by the hundred thousand. Apart from `mooli._native`, so that a
// process that only handles text never loads what computes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;

NB_MODULE(_gguf, m) {
  // Strings of GGUF metadata from `position` on, each its length in 64 bits and its text: up to `count`, and where they end.
  // Stops before the first that does not fit the data or is not UTF-8.
  m.def("read_strings", [](nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data, size_t position, size_t count) {
    const size_t size = data.shape(0);
    nb::list strings;
    for (size_t i = 0; i < count && position <= size && size - position >= 8; i++) {
      uint64_t length;
      memcpy(&length, data.data() + position, 8);
      if (length > size - position - 8) break;
      PyObject* text = PyUnicode_DecodeUTF8((const char*)data.data() + position + 8, Py_ssize_t(length), nullptr);
      if (!text) { PyErr_Clear(); break; }
      strings.append(nb::steal(text));
      position += 8 + length;
    }
    return nb::make_tuple(strings, position);
  });

  // Each text in two, at the first space that is not its first character. Stops before the first that has none, or is no text.
  m.def("split_pairs", [](nb::list lines) {
    nb::list pairs;
    for (nb::handle line : lines) {
      if (!PyUnicode_Check(line.ptr())) break;
      const Py_ssize_t length = PyUnicode_GET_LENGTH(line.ptr()), at = PyUnicode_FindChar(line.ptr(), ' ', 1, length, 1);
      if (at < 0) break;
      nb::object left = nb::steal(PyUnicode_Substring(line.ptr(), 0, at)), right = nb::steal(PyUnicode_Substring(line.ptr(), at + 1, length));
      if (!left || !right) throw nb::python_error();
      pairs.append(nb::make_tuple(left, right));
    }
    return pairs;
  });
}
