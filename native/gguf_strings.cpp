// The module `mooli._gguf`: strings of GGUF metadata, which come by the hundred thousand. Apart from `mooli._native`, so that a
// process that only handles text never loads what computes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

bool is_continuation(uint8_t byte) { return (byte & 0xc0) == 0x80; }

// Whether this is UTF-8: no code in more bytes than it needs, no surrogates, nothing beyond U+10FFFF (Unicode, table 3-7).
bool is_utf8(const uint8_t* text, size_t length) {
  size_t i = 0;
  while (i < length) {
    uint64_t eight;
    if (length - i >= 8 && (memcpy(&eight, text + i, 8), (eight & 0x8080808080808080u) == 0)) { i += 8; continue; }
    const uint8_t first = text[i];
    if (first < 0x80) { i++; continue; }
    const size_t more = first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    if (first < 0xc2 || first > 0xf4 || length - i <= more) return false;
    const uint8_t second = text[i + 1];
    if (second < (first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80) || second > (first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf)) return false;
    for (size_t at = 2; at <= more; at++) if (!is_continuation(text[i + at])) return false;
    i += 1 + more;
  }
  return true;
}

// Calls take(text, length, end) for strings of GGUF metadata from `position` on, each its length in 64 bits and its text: up to
// `count`. Stops before the first that does not fit the data or is not UTF-8, or where `take` says so.
template <class Take> void walk_strings(const Bytes& data, size_t position, size_t count, Take take) {
  const size_t size = data.shape(0);
  for (size_t i = 0; i < count && position <= size && size - position >= 8; i++) {
    uint64_t length;
    memcpy(&length, data.data() + position, 8);
    const uint8_t* text = data.data() + position + 8;
    if (length > size - position - 8 || !is_utf8(text, size_t(length))) return;
    position += 8 + length;
    if (!take((const char*)text, size_t(length), position)) return;
  }
}

// Python's own decoder takes twice as long for a few characters, a space of a token (U+0120) among them: it begins in ASCII
// and moves what it has at the first that is none. Wide characters are looked over first.
nb::object string_of(const char* text, size_t length) {
  const uint8_t* bytes = (const uint8_t*)text;
  wchar_t wide[128];
  uint8_t largest = 0;
  for (size_t i = 0; i < length; i++) if (bytes[i] > largest) largest = bytes[i];
  PyObject* string;
  if (largest < 0x80 || largest >= 0xe0 || length > sizeof wide / sizeof *wide) {  // ASCII, three bytes a character, or long
    string = PyUnicode_DecodeUTF8(text, Py_ssize_t(length), nullptr);
  } else {
    Py_ssize_t count = 0;
    for (size_t i = 0; i < length; i++) {
      const unsigned first = bytes[i];
      wide[count++] = wchar_t(first < 0x80 ? first : (first & 0x1f) << 6 | (bytes[++i] & 0x3f));
    }
    string = PyUnicode_FromWideChar(wide, count);
  }
  if (!string) throw nb::python_error();
  return nb::steal(string);
}

}  // namespace

NB_MODULE(_gguf, m) {
  m.def("read_strings", [](Bytes data, size_t position, size_t count) {
    nb::list strings;
    walk_strings(data, position, count, [&](const char* text, size_t length, size_t) {
      strings.append(string_of(text, length));
      return true;
    });
    return strings;
  });

  // Where each of these strings ends, without making any of them, of which files have 300,000. How many are good.
  m.def("string_ends", [](Bytes data, size_t position, nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> ends) {
    size_t found = 0;
    walk_strings(data, position, ends.shape(0), [&](const char*, size_t, size_t end) {
      ends.data()[found++] = int64_t(end);
      return true;
    });
    return found;
  });

  // Each string in two, at the first space that is not its first character. Stops before the first that has none.
  m.def("read_pairs", [](Bytes data, size_t position, size_t count) {
    nb::list pairs;
    walk_strings(data, position, count, [&](const char* text, size_t length, size_t) {
      const char* space = length > 1 ? (const char*)memchr(text + 1, ' ', length - 1) : nullptr;
      if (!space) return false;
      pairs.append(nb::make_tuple(string_of(text, size_t(space - text)), string_of(space + 1, size_t(text + length - space - 1))));
      return true;
    });
    return pairs;
  });
}
