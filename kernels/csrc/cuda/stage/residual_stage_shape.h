// Shapes of the stage kernel, as constants and pure functions: the kernel, its launcher and the tests share them.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

// What a stage begins with.
enum class Entry {
  kStem,  // an image of three channels and the 3x3 convolution before the first block
  kMap,  // a map of the stage's own shape
  kStrided,  // a map of half the channels and twice the size: the first block has stride 2 and a projection
};

// Copies in flight: one slice of filters is multiplied with while the next one comes.
constexpr int kStageSlots = 2;

// A map in shared memory: planes of 16 bytes of channels, in a plane a cell for each pixel. Eight neighbours in a row
// are 128 consecutive bytes, all banks once: for ldmatrix at any tap's offset, and for the sums of one 8x8 tile. Planes
// come in pairs, the 32 bytes of channels that one mma multiplies. Global memory has all channels of a pixel together,
// so that reading or writing 16 bytes in each lane touches several planes at once: the two of a pair lie half of the
// banks apart (4 cells modulo 8), and the pairs as many cells as the pixels that eight lanes see.
constexpr int plane_cells(int cells) { return cells + (12 - cells % 8) % 8; }
constexpr int pair_cells(int cells, int planes) { return 2 * plane_cells(cells) + (planes <= 4 ? 2 : 1); }

// Stage of residual blocks at kC channels of kBytes and kS x kS pixels; a block of kWarps warps carries kN images.
template <int kBytes, int kC, int kS, Entry kE, int kN, int kW>
struct StageShape {
  static constexpr int kChannels = kC, kSize = kS, kImages = kN, kWarps = kW, kThreads = 32 * kW;
  static constexpr Entry kEntry = kE;
  static constexpr int kPlanes = kC * kBytes / 16, kSteps = kPlanes / 2;

  // Rows of zeros above and below; one column of zeros serves as the right of its row and the left of the next.
  static constexpr int kPitch = kS + 1, kCells = (kS + 2) * kPitch + 1;
  static constexpr int kPlaneBytes = 16 * plane_cells(kCells), kPairBytes = 16 * pair_cells(kCells, kPlanes);
  static constexpr int kMapBytes = kSteps * kPairBytes;

  // The input of a strided block: even and odd columns in planes of their own, so that a stride of two pixels is a
  // stride of one cell. Zeros above and on the left; no tap reaches the other sides.
  static constexpr int kInPlanes = kPlanes / 2, kInSteps = kInPlanes / 2;
  static constexpr int kInCells = (2 * kS + 1) * kPitch;
  static constexpr int kInPlaneBytes = 16 * plane_cells(kInCells);
  static constexpr int kInPairBytes = 16 * pair_cells(kInCells, 2 * kInPlanes);
  static constexpr int kInBytes = 2 * kInSteps * kInPairBytes;

  // The image of a stem: cells of three channels and a zero. With 16-bit channels lanes read two rows at once: a pitch
  // of half a bank row, modulo all of it, keeps these apart. Behind it the image as it comes from memory.
  static constexpr int kStemPitch = 40, kStemCellBytes = 4 * kBytes;
  static constexpr int kStemCellsBytes = kStemCellBytes * kStemPitch * (kS + 2);
  static constexpr int kStemRawBytes = 3 * kBytes * kS * kS;

  // Warps: 16 columns of output channels, a strip of 16 pixels (of two half maps where rows have 8), kRows rows of it.
  static constexpr int kStrips = kS >= 16 ? kS / 16 : 1, kStripRows = kS >= 16 ? kS : kS / 2;
  static constexpr int kColumns = kC / 16, kRowGroups = kW / (kN * kStrips * kColumns);
  static constexpr int kRows = kStripRows / kRowGroups;
  static_assert(kN * kStrips * kColumns * kRowGroups == kW, "warps divide the work evenly");
  static_assert(kRows * kRowGroups == kStripRows, "warps divide the rows evenly");

  // Filters come in slices: nine taps of a pair of planes, as fragments; scale and shift behind the last of a layer.
  // The projection is one slice, and so is the stem: three columns of taps, four rows (the last zero) of four channels
  // (the last zero) each.
  static constexpr int kVectorBytes = 8 * kC, kSliceBytes = 9 * 32 * kC;
  static constexpr int kProjectionBytes = kInSteps * 32 * kC, kStemBytes = 48 * kBytes * kC;
  static constexpr int kSlotBytes = kSliceBytes + kVectorBytes;
  static constexpr int kFirstBytes = kE == Entry::kStem      ? kStemBytes + kVectorBytes
                                     : kE == Entry::kStrided ? kProjectionBytes + kVectorBytes
                                                             : 0;
  // Slices of 3x3 convolutions: those of the strided one, whose input has half the channels, come first.
  static constexpr int slices(int blocks) {
    return 2 * blocks * kSteps - (kE == Entry::kStrided ? kSteps - kInSteps : 0);
  }
  // Whether scale and shift lie behind a slice.
  static constexpr bool ends_layer(int slice) {
    return (slice + 1 + (kE == Entry::kStrided ? kSteps - kInSteps : 0)) % kSteps == 0;
  }

  // Shared memory: the block's map x; the map between its convolutions, in the place of what the entry reads; slots.
  static constexpr int kEntryBytes = kE == Entry::kStem      ? kStemCellsBytes + kStemRawBytes
                                     : kE == Entry::kStrided ? kInBytes
                                                             : 0;
  static constexpr int kMiddleBytes = kMapBytes > kEntryBytes ? kMapBytes : kEntryBytes;
  static constexpr int kMiddle = kN * kMapBytes, kSlots = kMiddle + kN * kMiddleBytes;
  static constexpr int kSharedBytes = kSlots + kStageSlots * kSlotBytes;
  static_assert(kSharedBytes <= 163 * 1024, "fits a block of sm_80");

  static constexpr int64_t grid(int64_t images) { return (images + kN - 1) / kN; }
};

}  // namespace resnet_fast::cuda
