// The module `mooli._gguf`: strings of GGUF metadata, which come by the hundred thousand. Apart from `mooli._native`, so that a
// process that only handles text never loads what computes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Calls take(text, end) for strings of GGUF metadata from `position` on, each its length in 64 bits and its text: up to `count`.
// Stops before the first that does not fit the data or is not UTF-8.
template <class Take> void walk_strings(const Bytes& data, size_t position, size_t count, Take take) {
  const size_t size = data.shape(0);
  for (size_t i = 0; i < count && position <= size && size - position >= 8; i++) {
    uint64_t length;
    memcpy(&length, data.data() + position, 8);
    if (length > size - position - 8) return;
    PyObject* text = PyUnicode_DecodeUTF8((const char*)data.data() + position + 8, Py_ssize_t(length), nullptr);
    if (!text) { PyErr_Clear(); return; }
    position += 8 + length;
    take(nb::steal(text), position);
  }
}

}  // namespace

NB_MODULE(_gguf, m) {
  m.def("read_strings", [](Bytes data, size_t position, size_t count) {
    nb::list strings;
    walk_strings(data, position, count, [&](nb::object text, size_t) { strings.append(std::move(text)); });
    return strings;
  });

  // Where each of these strings ends, without keeping their texts, of which files have 300,000. How many are good.
  m.def("string_ends", [](Bytes data, size_t position, nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> ends) {
    size_t found = 0;
    walk_strings(data, position, ends.shape(0), [&](const nb::object&, size_t end) { ends.data()[found++] = int64_t(end); });
    return found;
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
