// Words of 32 bits, of which images between layers consist: one fp32, or two bf16, channels that
// follow each other. They are moved about as floats.

#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/bit_cast.h>

#include <cstring>

namespace dspfx {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

struct Fp32 {
  static constexpr int64_t CHANNELS = 1;
  static constexpr uint32_t LOWEST = 0xff800000;  // -infinity in all channels
  static Vec multiply_add(Vec weights, Vec words, Vec sum) {
    return at::vec::fmadd(weights, words, sum);
  }
  static Vec channel(Vec words, int64_t) { return words; }
  static Vec joined(const Vec (&channels)[CHANNELS]) { return channels[0]; }
};

// Sums are fp32. Without instructions for bf16 products are those of fp32, channel by channel.
struct Bf16 {
  static constexpr int64_t CHANNELS = 2;
  static constexpr uint32_t LOWEST = 0xff80ff80;
  using Bits = at::vec::Vectorized<int32_t>;

  static Vec channel(Vec words, int64_t i) {
    if (i == 0) return at::vec::cast<float>(at::vec::cast<int32_t>(words) << Bits(16));
    return words & at::vec::cast<float>(Bits(HIGH));
  }

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  static constexpr bool INSTRUCTIONS = true;
  static Vec multiply_add(Vec weights, Vec words, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(weights),
                            (__m512bh)_mm512_castps_si512(words));
  }
  // Rounded to the nearest, ties to even.
  static Vec joined(const Vec (&channels)[CHANNELS]) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(channels[1], channels[0]);
    const __m512i order = _mm512_add_epi32(
        _mm512_set1_epi32(16 << 16),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x10001), _mm512_set_epi32(
            15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
  }
#else
  static constexpr bool INSTRUCTIONS = false;
  static Vec multiply_add(Vec weights, Vec words, Vec sum) {
    sum = at::vec::fmadd(channel(weights, 0), channel(words, 0), sum);
    return at::vec::fmadd(channel(weights, 1), channel(words, 1), sum);
  }
  static Vec joined(const Vec (&channels)[CHANNELS]) {
    const Bits low = at::vec::cast<int32_t>(rounded(channels[0]));
    const Bits high = at::vec::cast<int32_t>(rounded(channels[1]));
    return at::vec::cast<float>(((low >> Bits(16)) & Bits(0xffff)) | (high & Bits(HIGH)));
  }
#endif

 private:
  static constexpr int32_t HIGH = static_cast<int32_t>(0xffff0000);

  // The upper halves are those of the nearest, ties to even; none of a NaN becomes an infinity.
  static Vec rounded(Vec x) {
    const Bits bits = at::vec::cast<int32_t>(x);
    const Bits odd = (bits >> Bits(16)) & Bits(1);
    const Vec up = at::vec::cast<float>(bits + Bits(0x7fff) + odd);
    return Vec::blendv(up, at::vec::cast<float>(Bits(0x7fc00000)), x != x);
  }
};

// Writes one of the channels of `count` words, and leaves the others, which other threads may write.
template <typename W>
void store_channel(const float* words, int64_t channel, int64_t count, float* to) {
  constexpr size_t BYTES = sizeof(float) / W::CHANNELS;
  const char* from = reinterpret_cast<const char*>(words) + channel * BYTES;
  char* bytes = reinterpret_cast<char*>(to) + channel * BYTES;
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(bytes + i * sizeof(float), from + i * sizeof(float), BYTES);
}

}  // namespace dspfx
