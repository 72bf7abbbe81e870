// Shapes of the stage kernel as constants and pure functions, shared by the kernel, its launcher and the tests.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

// What a stage begins with.
enum class Entry {
  kStem,  // an image of three channels and the 3x3 convolution before the first block
  kMap,  // a feature map of the stage's own shape
  kStrided,  // a feature map of half the channels and twice the size: block one has stride 2 and a projection
};

// Slots of filter slices: one in use, the next on its way.
constexpr int kStageSlots = 2;

// An activation in shared memory: planes of 16 bytes of channels, a cell of 16 bytes per pixel. Eight adjacent cells
// are 128 consecutive bytes, every bank once, both for ldmatrix at any tap's offset and for storing an 8x8 tile. Two
// planes make a pair: the 32 bytes of channels that one mma takes. Global memory holds all channels of a pixel
// together, so lanes that copy 16 bytes each touch several planes at once. To avoid bank conflicts the planes of a pair
// lie half the banks apart (4 cells modulo 8), and the pairs as many cells apart as eight lanes see pixels.
constexpr int plane_cells(int cells) { return cells + (12 - cells % 8) % 8; }
constexpr int pair_cells(int cells, int planes) { return 2 * plane_cells(cells) + (planes <= 4 ? 2 : 1); }

// A stage of residual blocks: kC channels of kBytes bytes, kS x kS pixels; a thread block of kW warps carries kN
// images.
template <int kBytes, int kC, int kS, Entry kE, int kN, int kW>
struct StageShape {
  static constexpr int kChannels = kC, kSize = kS, kImages = kN, kWarps = kW, kThreads = 32 * kW;
  static constexpr Entry kEntry = kE;
  static constexpr int kPlanes = kC * kBytes / 16, kSteps = kPlanes / 2;

  // Padding: a row of zeros above and below; one column of zeros between rows, right of one and left of the next.
  static constexpr int kPitch = kS + 1, kCells = (kS + 2) * kPitch + 1;
  static constexpr int kPlaneBytes = 16 * plane_cells(kCells), kPairBytes = 16 * pair_cells(kCells, kPlanes);
  static constexpr int kActivationBytes = kSteps * kPairBytes;

  // Input of a strided block: even and odd columns in planes of their own, so that a stride of two pixels is one cell.
  // Padding above and on the left; no tap reaches the other sides.
  static constexpr int kInPlanes = kPlanes / 2, kInSteps = kInPlanes / 2;
  static constexpr int kInCells = (2 * kS + 1) * kPitch;
  static constexpr int kInPlaneBytes = 16 * plane_cells(kInCells);
  static constexpr int kInPairBytes = 16 * pair_cells(kInCells, 2 * kInPlanes);
  static constexpr int kInBytes = 2 * kInSteps * kInPairBytes;

  // The stem's image: cells of three channels and a zero. With 16-bit channels lanes read two rows at once, so the
  // pitch is half of all banks modulo all banks. Behind it the image as copied from global memory.
  static constexpr int kStemPitch = 40, kStemCellBytes = 4 * kBytes;
  static constexpr int kStemCellsBytes = kStemCellBytes * kStemPitch * (kS + 2);
  static constexpr int kStemRawBytes = 3 * kBytes * kS * kS;

  // Warp tile: 16 output channels, strips of 16 pixels (8 from each half of the image if rows have 8), kRows rows.
  static constexpr int kStrips = kS >= 16 ? kS / 16 : 1, kStripRows = kS >= 16 ? kS : kS / 2;
  static constexpr int kColumns = kC / 16, kRowGroups = kW / (kN * kStrips * kColumns);
  static constexpr int kRows = kStripRows / kRowGroups;
  static_assert(kN * kStrips * kColumns * kRowGroups == kW, "warps divide the work evenly");
  static_assert(kRows * kRowGroups == kStripRows, "warps divide the rows evenly");

  // Filters come in slices: nine taps of a pair of planes, packed as mma fragments; scale and shift follow a layer's
  // last slice. The projection is one slice. The stem is one slice: three columns of taps, four rows (the last zero) of
  // four channels (the last zero).
  static constexpr int kScaleShiftBytes = 8 * kC, kSliceBytes = 9 * 32 * kC;
  static constexpr int kProjectionBytes = kInSteps * 32 * kC, kStemBytes = 48 * kBytes * kC;
  static constexpr int kSlotBytes = kSliceBytes + kScaleShiftBytes;
  static constexpr int kFirstBytes = kE == Entry::kStem      ? kStemBytes + kScaleShiftBytes
                                     : kE == Entry::kStrided ? kProjectionBytes + kScaleShiftBytes
                                                             : 0;
  // Slices of 3x3 convolutions. The strided one, whose input has half the channels, comes first.
  static constexpr int slices(int blocks) {
    return 2 * blocks * kSteps - (kE == Entry::kStrided ? kSteps - kInSteps : 0);
  }
  // Whether scale and shift follow a slice.
  static constexpr bool ends_layer(int slice) {
    return (slice + 1 + (kE == Entry::kStrided ? kSteps - kInSteps : 0)) % kSteps == 0;
  }

  // Shared memory: the block's input x; the activation between its convolutions, where the entry's input lay; slots.
  static constexpr int kEntryBytes = kE == Entry::kStem      ? kStemCellsBytes + kStemRawBytes
                                     : kE == Entry::kStrided ? kInBytes
                                                             : 0;
  static constexpr int kMiddleBytes = kActivationBytes > kEntryBytes ? kActivationBytes : kEntryBytes;
  static constexpr int kMiddleOffset = kN * kActivationBytes, kSlotsOffset = kMiddleOffset + kN * kMiddleBytes;
  static constexpr int kSharedBytes = kSlotsOffset + kStageSlots * kSlotBytes;
  static_assert(kSharedBytes <= 163 * 1024, "fits a block of sm_80");

  static constexpr int64_t grid(int64_t images) { return (images + kN - 1) / kN; }
};

}  // namespace resnet_fast::cuda
