// Integer weights behind a mask, 128 columns at a time: expanding their codes, and multiplying them by bytes.
//
// A pair is two chunks of 64 columns with 64 bits each. The codes of int8 are one byte each, those of the second chunk
// after those of the first. int4 shares bytes: the codes of the first chunk are the low nibbles, those of the second
// the high ones, and the pair takes as many bytes as the chunk that has more. Codes are stored from 0 up; a column
// without a weight gets the code of zero. Each unit offers
//   Chunk                       64 expanded codes
//   start_lanes<values>(group)  how many lanes of the sum of a group start at -(zero code) times the q they will meet:
//                               lane j takes column c if c / 4 % lanes is j; 0 where the codes are signed
//   is_sixteenfold<values>      whether those of a second chunk are 16 times the code, as they lie in the high nibble:
//                               its starts must be so too, and its scales a sixteenth
//   expand_pair                 the codes of a pair; moves `codes` on; may read 64 bytes beyond the last code
//   store_codes                 a chunk's 64 codes as bytes from 0 up
//   add_pair                    sums += the pair's products with x, per group of kGroup columns times its scale
#pragma once
#include "simd/dot.h"

namespace {
namespace simd {

template <zs::Values kValues>
constexpr uint8_t kZeroCode = kValues == zs::Values::int4 ? 8 : 128;

inline uint64_t bits64(const uint32_t* bits) {
  uint64_t word;
  __builtin_memcpy(&word, bits, 8);
  return word;
}

#if defined(__AVX512VBMI2__)

typedef __m512i Chunk;
template <zs::Values>
constexpr int64_t start_lanes(int64_t group) {
  return group == 32 ? 8 : 16;
}
template <zs::Values kValues>
constexpr bool is_sixteenfold(int64_t group) {
  return kValues == zs::Values::int4 && group <= 64;
}

template <zs::Values kValues, int kGroup>
inline void expand_pair(const uint32_t* bits, const uint8_t*& codes, Chunk (&out)[2]) {
  const uint64_t first = bits64(bits), second = bits64(bits + 2);
  const int64_t count = __builtin_popcountll(first), other = __builtin_popcountll(second);
  // Expanding into a register of zero codes costs no more than into zeros, and nothing has to be masked afterwards.
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(kZeroCode<kValues>));
  if constexpr (kValues == zs::Values::int4) {
    const __m512i nibble = _mm512_set1_epi8(15), both = _mm512_loadu_si512(codes);
    out[0] = _mm512_mask_expand_epi8(zero, first, _mm512_and_si512(both, nibble));
    if constexpr (is_sixteenfold<kValues>(kGroup))
      out[1] = _mm512_mask_expand_epi8(_mm512_set1_epi8(-128), second, _mm512_andnot_si512(nibble, both));
    else
      out[1] = _mm512_mask_expand_epi8(zero, second, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
    codes += count > other ? count : other;
  } else {
    __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + count);
    asm("" : "+v"(low), "+v"(high));  // expanding from memory is microcode
    out[0] = _mm512_mask_expand_epi8(zero, first, low);
    out[1] = _mm512_mask_expand_epi8(zero, second, high);
    codes += count + other;
  }
}

template <zs::Values>
inline void store_codes(uint8_t* out, const Chunk& chunk) {
  _mm512_storeu_si512(out, chunk);
}

template <zs::Values, int kGroup, int kSums>
inline void add_pair(f32 (&sums)[kSums], const Chunk (&chunks)[2], const int8_t* x, const int32_t* starts,
                     const float* scales) {
  const __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 64);
  f32 &first = sums[0], &second = sums[kSums - 1];
  const __m512i start = _mm512_loadu_si512(starts);
  if constexpr (kGroup == 128) {
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, chunks[0], low), chunks[1], high);
    first = fma(_mm512_cvtepi32_ps(sum), set(scales[0]), first);
    return;
  }
  const f32 sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, chunks[0], low));
  const f32 other = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(starts + 16), chunks[1], high));
  if constexpr (kGroup == 64) {
    first = fma(sum, set(scales[0]), first);
    second = fma(other, set(scales[1]), second);
  } else {
    const auto two = [&](int i) __attribute__((always_inline)) {  // columns 0 to 31 are lanes 0 to 7
      return _mm512_mask_broadcastss_ps(set(scales[i]), 0xFF00, _mm_load_ss(scales + i + 1));
    };
    first = fma(sum, two(0), first);
    second = fma(other, two(2), second);
  }
}

#elif defined(__AVX2__)

struct Chunk {
  __m256i half[2];
};
// Bytes that are added up in 16 bits: nibbles may stay from 0 up, larger codes become signed, so that |code| times x
// with the code's sign fits.
template <zs::Values kValues>
constexpr bool kUnsigned = kValues == zs::Values::int4;
template <zs::Values kValues>
constexpr int64_t start_lanes(int64_t) {
  return kUnsigned<kValues> ? 8 : 0;
}
template <zs::Values>
constexpr bool is_sixteenfold(int64_t) {
  return false;
}

// The shuffle of 16 columns is the sum of two entries: that of the first eight has, in its upper half, how many they
// are.
struct ByteShuffles {
  alignas(64) uint8_t first[256][16];
  uint8_t second[256][16];
};
constexpr ByteShuffles make_byte_shuffles() {
  ByteShuffles shuffles{};
  for (int bits = 0; bits < 256; ++bits) {
    uint8_t rank = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool set = bits >> lane & 1;
      shuffles.first[bits][lane] = shuffles.second[bits][8 + lane] = set ? rank : 0x80;
      rank = static_cast<uint8_t>(rank + set);
    }
    for (int lane = 8; lane < 16; ++lane) shuffles.first[bits][lane] = rank;
  }
  return shuffles;
}
constexpr ByteShuffles kByteShuffles = make_byte_shuffles();

// A call would send 128 expanded codes through memory, so the compiler has no say.
#define ZS_INLINE __attribute__((always_inline)) inline

// That of columns [16 i, 16 i + 16). The offsets of the entries are cut out of the word at once, 16 times the byte.
ZS_INLINE __m128i shuffle_of_16(uint64_t bits, int i) {
  const uint64_t first = (i ? bits >> (16 * i - 4) : bits << 4) & 0xFF0, second = bits >> (16 * i + 4) & 0xFF0;
  return _mm_add_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(kByteShuffles.first[0] + first)),
                      _mm_load_si128(reinterpret_cast<const __m128i*>(kByteShuffles.second[0] + second)));
}

// 64 columns; kShift picks the nibbles, or -1 whole bytes. Returns how many codes they have.
template <int kShift>
ZS_INLINE int64_t expand_chunk(uint64_t bits, const uint8_t* codes, Chunk& out) {
  const __m128i zero = _mm_set1_epi8(static_cast<char>(kShift >= 0 ? 0x88 : 0x80));  // its code becomes 0
  __m128i part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int64_t before = i ? _mm_popcnt_u64(_bzhi_u64(bits, static_cast<uint32_t>(16 * i))) : 0;
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + before));
    part[i] = _mm_shuffle_epi8(_mm_xor_si128(v, zero), shuffle_of_16(bits, i));
  }
  for (int i = 0; i < 2; ++i) {
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(part[2 * i]), part[2 * i + 1], 1);
    if (kShift == 4) both = _mm256_srli_epi16(both, 4);
    if (kShift >= 0) both = _mm256_xor_si256(_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
    out.half[i] = both;
  }
  return _mm_popcnt_u64(bits);
}

template <zs::Values kValues, int>
ZS_INLINE void expand_pair(const uint32_t* bits, const uint8_t*& codes, Chunk (&out)[2]) {
  if constexpr (kValues == zs::Values::int4) {
    const int64_t count = expand_chunk<0>(bits64(bits), codes, out[0]);
    const int64_t other = expand_chunk<4>(bits64(bits + 2), codes, out[1]);
    codes += count > other ? count : other;
  } else {
    codes += expand_chunk<-1>(bits64(bits), codes, out[0]);
    codes += expand_chunk<-1>(bits64(bits + 2), codes, out[1]);
  }
}

template <zs::Values kValues>
ZS_INLINE void store_codes(uint8_t* out, const Chunk& chunk) {
  const __m256i sign = _mm256_set1_epi8(kUnsigned<kValues> ? 0 : -128);
  for (int i = 0; i < 2; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, _mm256_xor_si256(chunk.half[i], sign));
}

// 16-bit sums of two neighbours each, of 32 columns.
template <zs::Values kValues>
inline __m256i multiply_32(__m256i codes, const int8_t* x) {
  const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  if constexpr (kUnsigned<kValues>) return _mm256_maddubs_epi16(codes, q);
  return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes));
}
template <zs::Values kValues>
inline f32 widen(__m256i sums, const int32_t* start) {
  __m256i wide = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  if constexpr (kUnsigned<kValues>)
    wide = _mm256_add_epi32(wide, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start)));
  return _mm256_cvtepi32_ps(wide);
}

template <zs::Values kValues, int kGroup, int kSums>
inline void add_pair(f32 (&sums)[kSums], const Chunk (&chunks)[2], const int8_t* x, const int32_t* starts,
                     const float* scales) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i part[4];
  for (int i = 0; i < 4; ++i) part[i] = multiply_32<kValues>(chunks[i / 2].half[i % 2], x + 32 * i);
  if constexpr (kGroup == 32) {
    for (int i = 0; i < 4; ++i)
      sums[i % kSums] = fma(widen<kValues>(part[i], starts + 8 * i), set(scales[i]), sums[i % kSums]);
  } else if constexpr (kUnsigned<kValues>) {  // 2 x 15 x 127 four times fits 16 bits
    const __m256i low = _mm256_add_epi16(part[0], part[1]), high = _mm256_add_epi16(part[2], part[3]);
    if constexpr (kGroup == 128) {
      sums[0] = fma(widen<kValues>(_mm256_add_epi16(low, high), starts), set(scales[0]), sums[0]);
    } else {
      sums[0] = fma(widen<kValues>(low, starts), set(scales[0]), sums[0]);
      sums[kSums - 1] = fma(widen<kValues>(high, starts + 8), set(scales[1]), sums[kSums - 1]);
    }
  } else {
    const __m256i low = _mm256_add_epi32(_mm256_madd_epi16(part[0], ones), _mm256_madd_epi16(part[1], ones));
    const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(part[2], ones), _mm256_madd_epi16(part[3], ones));
    if constexpr (kGroup == 128) {
      sums[0] = fma(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)), set(scales[0]), sums[0]);
    } else {
      sums[0] = fma(_mm256_cvtepi32_ps(low), set(scales[0]), sums[0]);
      sums[kSums - 1] = fma(_mm256_cvtepi32_ps(high), set(scales[1]), sums[kSums - 1]);
    }
  }
}

#else

struct Chunk {
  uint8_t code[64];
};
template <zs::Values>
constexpr int64_t start_lanes(int64_t) {
  return 1;
}
template <zs::Values>
constexpr bool is_sixteenfold(int64_t) {
  return false;
}

template <zs::Values kValues, int kShift>
inline const uint8_t* expand_chunk(const uint32_t* bits, const uint8_t* codes, Chunk& out) {
  for (int i = 0; i < 64; ++i) {
    const bool set = bits[i / 32] >> i % 32 & 1;
    const uint8_t code = kValues == zs::Values::int4 ? *codes >> kShift & 15 : *codes;
    out.code[i] = set ? code : kZeroCode<kValues>;
    codes += set;
  }
  return codes;
}

template <zs::Values kValues, int>
inline void expand_pair(const uint32_t* bits, const uint8_t*& codes, Chunk (&out)[2]) {
  const uint8_t* first = expand_chunk<kValues, 0>(bits, codes, out[0]);
  const uint8_t* second = expand_chunk<kValues, 4>(bits + 2, kValues == zs::Values::int4 ? codes : first, out[1]);
  codes = first > second ? first : second;
}

template <zs::Values>
inline void store_codes(uint8_t* out, const Chunk& chunk) {
  memcpy(out, chunk.code, sizeof chunk.code);
}

template <zs::Values, int kGroup, int kSums>
inline void add_pair(f32 (&sums)[kSums], const Chunk (&chunks)[2], const int8_t* x, const int32_t* starts,
                     const float* scales) {
  for (int g = 0; g < 128 / kGroup; ++g) {
    int32_t sum = starts[g];
    for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) sum += chunks[i / 64].code[i % 64] * x[i];
    sums[0][g % kLanes] += static_cast<float>(sum) * scales[g];
  }
}

#endif

}  // namespace simd
}  // namespace
