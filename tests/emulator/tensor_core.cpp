// What mma and ldmatrix compute, once for the whole warp.
//
// Fragment layouts as in the PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
#ifdef __F16C__
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>
#include <type_traits>

#include "common/ptx.cuh"

namespace fastshard::simt {

// Lane l gets the 32-bit word l % 4 of row l / 4: two elements that lie side by side.
void combine_ldmatrix(void* const* records, uint32_t) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      const unsigned char* source = static_cast<LdmatrixRecord*>(records[matrix * 8 + row])->row;
      for (int word = 0; word < 4; ++word) {
        std::memcpy(&static_cast<LdmatrixRecord*>(records[row * 4 + word])->d[matrix], source + word * 4, 4);
      }
    }
  }
}

// Lane l gets column l / 4 of rows 2 * (l % 4) and the next.
void combine_ldmatrix_trans(void* const* records, uint32_t) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elems[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elems[row], static_cast<LdmatrixRecord*>(records[matrix * 8 + row])->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane % 4 * 2, column = lane / 4;
      const uint32_t pair = elems[row][column] | uint32_t(elems[row + 1][column]) << 16;
      static_cast<LdmatrixRecord*>(records[lane])->d[matrix] = pair;
    }
  }
}

namespace {

// Eight 16-bit elements to float.
template <typename T>
void decode(float* values, const uint16_t* bits) {
#ifdef __F16C__
  if constexpr (std::is_same_v<T, __half>) {
    return _mm256_storeu_ps(values, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits))));
  }
#endif
  for (int i = 0; i < 8; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      values[i] = __half2float(std::bit_cast<__half>(bits[i]));
    } else {
      values[i] = std::bit_cast<float>(uint32_t(bits[i]) << 16);
    }
  }
}

}  // namespace

template <typename T>
void combine_mma(void* const* records, uint32_t) {
  using Row = float __attribute__((vector_size(32)));  // the eight columns of b and d
  uint16_t a_bits[16][16], b_bits[8][16];  // a[row][k], b[column][k]; each register holds two neighbours in k
  float a[16][16], b_transposed[8][16];
  Row b[16], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& record = *static_cast<const MmaRecord*>(records[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    std::memcpy(&a_bits[row][column], &record.a[0], 4);
    std::memcpy(&a_bits[row + 8][column], &record.a[1], 4);
    std::memcpy(&a_bits[row][column + 8], &record.a[2], 4);
    std::memcpy(&a_bits[row + 8][column + 8], &record.a[3], 4);
    std::memcpy(&b_bits[row][column], &record.b[0], 4);
    std::memcpy(&b_bits[row][column + 8], &record.b[1], 4);
    for (int i = 0; i < 4; ++i) d[row + i / 2 * 8][column + i % 2] = record.d[i];
  }
  for (int i = 0; i < 16 * 16; i += 8) decode<T>(&a[0][0] + i, &a_bits[0][0] + i);
  for (int i = 0; i < 8 * 16; i += 8) decode<T>(&b_transposed[0][0] + i, &b_bits[0][0] + i);
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < 8; ++column) b[k][column] = b_transposed[column][k];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) d[row] += a[row][k] * b[k];
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& record = *static_cast<const MmaRecord*>(records[lane]);
    for (int i = 0; i < 4; ++i) record.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

// The sum of 16 products and c, rounded once: PTX leaves open what is rounded on the way.
void combine_mma_fp16(void* const* records, uint32_t lanes) {
  float sums[32][4];
  MmaRecord with_floats[32];
  void* pointers[32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& record = *static_cast<const MmaFp16Record*>(records[lane]);
    for (int i = 0; i < 4; ++i) {
      sums[lane][i] = __half2float(std::bit_cast<__half>(uint16_t(record.c[i / 2] >> i % 2 * 16)));
    }
    with_floats[lane] = {sums[lane], record.a, {record.b[0], record.b[1]}};
    pointers[lane] = &with_floats[lane];
  }
  combine_mma<__half>(pointers, lanes);
  for (int lane = 0; lane < 32; ++lane) {
    const auto bits = [&](int i) { return uint32_t(std::bit_cast<uint16_t>(__float2half_rn(sums[lane][i]))); };
    uint32_t* const d = static_cast<const MmaFp16Record*>(records[lane])->d;
    d[0] = bits(0) | bits(1) << 16;
    d[1] = bits(2) | bits(3) << 16;
  }
}

template void combine_mma<__half>(void* const*, uint32_t);
template void combine_mma<__nv_bfloat16>(void* const*, uint32_t);

}  // namespace fastshard::simt
