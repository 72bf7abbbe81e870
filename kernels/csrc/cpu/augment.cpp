// The operator augment: a batch from uint8 images in memory, cropped, mirrored and normalised, a single pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "cpu/kept_memory.h"

namespace resnet_fast {
namespace {

constexpr int64_t kValues = 256;  // of a pixel
// Elements a thread takes at least.
constexpr int64_t kGrain = 16384;

// The finalizer of splitmix64 (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Where an image is read: its window's corner in the padded image, and whether the window is mirrored.
struct Window {
  int64_t top, left;
  bool mirrored;
};

Window draw(uint64_t stream, int64_t index, int64_t padding, bool flip) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;
  const uint64_t state = mix(stream + static_cast<uint64_t>(index));
  const auto number = [&](uint64_t i) { return static_cast<double>(mix(state + kStep * i) >> 11) * 0x1p-53; };
  const double shifts = static_cast<double>(2 * padding + 1);
  // In double, as NumPy computes it: the product rounds.
  return {static_cast<int64_t>(number(1) * shifts), static_cast<int64_t>(number(2) * shifts), flip && number(3) < 0.5};
}

struct Images {
  const uint8_t* data;
  int64_t channels, height, width;

  const uint8_t* row(int64_t index, int64_t channel, int64_t y) const {
    return data + ((index * channels + channel) * height + y) * width;
  }
};

// Row `h` of one channel of the output, whose pixels are `step` elements apart.
template <typename E>
void write_row(const uint8_t* row, int64_t width, int64_t shift, bool mirrored, const E* values, E* out, int64_t step) {
  // Column x = w + shift, or x = width - 1 - w + shift where mirrored, of the image; zeros outside of it.
  const int64_t first = std::clamp<int64_t>(mirrored ? shift : -shift, 0, width);
  const int64_t end = std::clamp<int64_t>(mirrored ? width + shift : width - shift, first, width);
  for (int64_t w = 0; w < first; ++w) out[w * step] = values[0];
  const int64_t start = mirrored ? width - 1 + shift : shift, direction = mirrored ? -1 : 1;
  for (int64_t w = first; w < end; ++w) out[w * step] = values[row[start + direction * w]];
  for (int64_t w = end; w < width; ++w) out[w * step] = values[0];
}

template <typename E>
void write_image(const Images& from, int64_t index, const Window& window, int64_t padding, const E* table,
                 int64_t channels, E* out) {
  for (int64_t h = 0; h < from.height; ++h) {
    const int64_t y = h + window.top - padding;
    const bool outside = index < 0 || y < 0 || y >= from.height;
    for (int64_t k = 0; k < channels; ++k) {
      const E* const values = table + k * kValues;
      E* const to = out + h * from.width * channels + k;
      if (outside) {
        for (int64_t w = 0; w < from.width; ++w) to[w * channels] = values[0];
      } else {
        const uint8_t* const row = from.row(index, from.channels == 1 ? 0 : k, y);
        write_row(row, from.width, window.left - padding, window.mirrored, values, to, channels);
      }
    }
  }
}

Tensor augment(const Tensor& images, const Tensor& index, const Tensor& table, std::optional<int64_t> stream,
               int64_t padding, bool flip) {
  constexpr const char* op = "augment";
  check_rank(op, "images", images, 4, "[set, channels, height, width]");
  RESNET_FAST_CHECK(images.is_cpu() && images.scalar_type() == ScalarType::Byte && images.is_contiguous(), op,
                    ": images of shape ", shape(images), " are not contiguous uint8 on the CPU");
  check_rank(op, "index", index, 1, "[batch]");
  RESNET_FAST_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Long && index.is_contiguous(), op,
                    ": index of shape ", shape(index), " is not a contiguous int64 on the CPU");
  check_rank(op, "table", table, 2, "[channels, 256]");
  const int64_t channels = table.size(0);
  RESNET_FAST_CHECK(table.is_cpu() && table.size(1) == kValues && table.is_contiguous(), op, ": table has shape ",
                    shape(table), ", want a contiguous [channels, 256] on the CPU");
  const ScalarType dtype = table.scalar_type();
  RESNET_FAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                        dtype == ScalarType::BFloat16,
                    op, ": table has a dtype of ", table.element_size(), " bytes that is none of float16, bfloat16, ",
                    "float32 and float64");
  RESNET_FAST_CHECK(images.size(1) == channels || images.size(1) == 1, op, ": images have ", images.size(1),
                    " channels, want 1, or ", channels, " as table has");
  RESNET_FAST_CHECK(padding >= 0 && padding <= kMaxPadding, op, ": padding is ", padding, ", want from 0 to ",
                    kMaxPadding);
  const int64_t* const indices = static_cast<const int64_t*>(index.data_ptr());
  const int64_t n = index.size(0), count = images.size(0);
  for (int64_t i = 0; i < n; ++i) {
    RESNET_FAST_CHECK(indices[i] >= -1 && indices[i] < count, op, ": index holds ", indices[i], ", want from -1 to ",
                      count - 1);
  }
  const Images from{static_cast<const uint8_t*>(images.data_ptr()), images.size(1), images.size(2), images.size(3)};
  Tensor out = empty_tensor({n, channels, from.height, from.width}, dtype);
  const int64_t size = channels * from.height * from.width;
  if (n * size == 0) return out;
  // Elements are moved, whatever they are.
  const auto write = [&](auto element) {
    using E = decltype(element);
    const E* const values = static_cast<const E*>(table.data_ptr());
    E* const to = static_cast<E*>(out.data_ptr());
    torch::stable::parallel_for(0, n, std::max<int64_t>(kGrain / size, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Window window =
            stream ? draw(static_cast<uint64_t>(*stream), indices[i], padding, flip) : Window{padding, padding, false};
        write_image(from, indices[i], window, padding, values, channels, to + i * size);
      }
    });
  };
  switch (table.element_size()) {
    case 2: write(uint16_t{}); break;
    case 4: write(uint32_t{}); break;
    default: write(uint64_t{});
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("augment", TORCH_BOX(&augment)); }

}  // namespace resnet_fast
