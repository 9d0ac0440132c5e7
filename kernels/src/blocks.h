// The matrices as they are stored: the blocks of a GGUF file, in tiles of 32 outputs by 32 inputs.
//
// A matrix [outputs, inputs] is a tensor of bytes [outputs / 32, inputs / 32, tile bytes]; tiles of the same 32 outputs
// follow each other, in the order in which a product reads them. A tile is, o being one of its outputs and i an input:
//
//   Q4_1  four times [32 o][4] bytes, byte (o, k) of the j-th with the codes of input 4j + k (low half) and 16 + 4j + k
//         (high half); 32 scales and 32 minimums in float16. A weight is scale * code + minimum.
//   Q4_0  the same without minimums. A weight is scale * (code - 8).
//   Q8_0  eight times [32 o][4] bytes, byte (o, k) of the j-th with the code of input 4j + k, plus 128; 32 scales in
//         float16. A weight is scale * (byte - 128).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kernels {

// Outputs of a tile, and inputs of a tile.
constexpr size_t kBlock = 32;

enum class BlockType { kQ4_0, kQ4_1, kQ8_0 };

constexpr size_t CodeBytes(BlockType type) { return type == BlockType::kQ8_0 ? 1024 : 512; }

constexpr size_t TileBytes(BlockType type) { return CodeBytes(type) + (type == BlockType::kQ4_1 ? 4 : 2) * kBlock; }

// A matrix [outputs, inputs] of tiles.
struct Tiles {
  const uint8_t* data = nullptr;
  size_t outputs = 0;
  size_t inputs = 0;
  BlockType type = BlockType::kQ4_1;

  size_t count() const { return outputs / kBlock; }  // of tiles of the same inputs
  size_t blocks() const { return inputs / kBlock; }
  const uint8_t* strip(size_t tile) const { return data + tile * blocks() * TileBytes(type); }
};

}  // namespace kernels
