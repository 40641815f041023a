// Rows of flat arrays, cut one behind the other or spread over the panel.
//
// Each row lies elsewhere in memory, so the next ones are fetched while one is copied. Every range
// and every gene is checked: the functions return the first row that is wrong, or -1.

#include <cstdint>
#include <cstring>
#include <new>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kLine = 64;       // bytes of a cache line
constexpr int64_t kAhead = 2;       // rows that are fetched while one is copied
constexpr int64_t kFetched = 4096;  // bytes of each; the processor goes on by itself

void fetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes && at < kFetched; at += kLine) __builtin_prefetch(from + at);
}

// The rows [start, stop) of `length` values.
struct Rows {
  const int64_t *starts, *stops;
  int64_t count, length;

  int64_t first_wrong() const {
    for (int64_t row = 0; row < count; ++row)
      if (starts[row] < 0 || stops[row] < starts[row] || stops[row] > length) return row;
    return -1;
  }
  void fetch_ahead(int64_t row, const void* values, int64_t width) const {
    row += kAhead;
    if (row < count)
      fetch(static_cast<const char*>(values) + starts[row] * width,
            (stops[row] - starts[row]) * width);
  }
};

// Copies past the caches; both addresses lie equally far behind a cache line's beginning.
void stream(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (head > bytes) head = bytes;
  std::memcpy(to, from, head);
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine)
    for (int64_t part = at; part < at + kLine; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(from + part)));
  std::memcpy(to + at, from + at, bytes - at);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Sets the values of one row; tells whether all genes are in the panel.
template <class Gene, class Value, class Out>
bool fill(const Gene* genes, const Value* values, int64_t start, int64_t stop, Out* out,
          int64_t panel) {
  for (int64_t at = start; at < stop; ++at) {
    if (static_cast<uint64_t>(genes[at]) >= static_cast<uint64_t>(panel)) return false;
    out[genes[at]] = static_cast<Out>(values[at]);
  }
  return true;
}

// Bytes are spread in place: a row of them stays in the nearest cache. Wider values are spread in a
// row of zeros that stays in a cache, copied from there to memory, and taken out again.
template <class Gene, class Value, class Out>
int64_t spread(const Gene* genes, const Value* values, const Rows& rows, Out* out, int64_t panel) {
  const int64_t bytes = panel * sizeof(Out);
  char* room = nullptr;
  if (sizeof(Out) > 1) {
    room = new (std::nothrow) char[bytes + 2 * kLine]();
    if (!room) return rows.count;
  }
  int64_t wrong = rows.first_wrong();
  for (int64_t row = 0; row < rows.count && wrong < 0; ++row) {
    const int64_t start = rows.starts[row], stop = rows.stops[row];
    Out* const target = out + row * panel;
    rows.fetch_ahead(row, genes, sizeof(Gene));
    rows.fetch_ahead(row, values, sizeof(Value));
    if (!room) {
      std::memset(target, 0, bytes);
      if (!fill(genes, values, start, stop, target, panel)) wrong = row;
      continue;
    }
    char* const aligned = room + (-reinterpret_cast<intptr_t>(room) & (kLine - 1));
    Out* const zeros =
        reinterpret_cast<Out*>(aligned + (reinterpret_cast<intptr_t>(target) & (kLine - 1)));
    if (fill(genes, values, start, stop, zeros, panel))
      stream(reinterpret_cast<char*>(target), reinterpret_cast<const char*>(zeros), bytes);
    else
      wrong = row;
    for (int64_t at = start; at < stop && wrong < 0; ++at) zeros[genes[at]] = 0;
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
  delete[] room;
  return wrong;
}

}  // namespace

extern "C" int64_t cut_rows(const char* values, int64_t width, const int64_t* starts,
                            const int64_t* stops, int64_t count, int64_t length, char* out) {
  const Rows rows{starts, stops, count, length};
  const int64_t wrong = rows.first_wrong();
  for (int64_t row = 0; row < count && wrong < 0; ++row) {
    rows.fetch_ahead(row, values, width);
    const int64_t bytes = (stops[row] - starts[row]) * width;
    std::memcpy(out, values + starts[row] * width, bytes);
    out += bytes;
  }
  return wrong;
}

#define SPREAD(name, Gene, Value, Out)                                                           \
  extern "C" int64_t spread_##name(const Gene* genes, const Value* values, const int64_t* starts, \
                                   const int64_t* stops, int64_t count, int64_t length, Out* out, \
                                   int64_t panel) {                                               \
    return spread(genes, values, Rows{starts, stops, count, length}, out, panel);                 \
  }
#define SPREAD_OF(genes, Gene)                  \
  SPREAD(genes##_u1_u1, Gene, uint8_t, uint8_t) \
  SPREAD(genes##_u2_f4, Gene, uint16_t, float)  \
  SPREAD(genes##_u4_f4, Gene, uint32_t, float)  \
  SPREAD(genes##_f4_f4, Gene, float, float)

SPREAD_OF(u2, uint16_t)
SPREAD_OF(u4, uint32_t)
SPREAD_OF(i4, int32_t)
SPREAD_OF(i8, int64_t)
