// How a chain of convolutions is spread over memory and threads.
//
// Depth first: where there are enough images, each thread carries a few of them through the whole chain, so that the
// maps stay in its own cache. The images that are left over go layer by layer, every thread taking a part of each
// layer. Both orders do the same arithmetic for each output, so results do not depend on the number of threads.
#include "stage.h"

#include <torch/csrc/stable/ops.h>

#include <numeric>

#include "../checks.h"
#include "filters.h"
#include "maps.h"

namespace resnet_fast {
namespace {

using torch::stable::parallel_for;

// Pixels that a thread should have at hand in a layer, lest it wait for filters: enough images are carried together.
constexpr int64_t kMinPixels = 192;
// Filters larger than this are split over the threads of a layer; smaller ones are read by every thread.
constexpr int64_t kSplitFilterBytes = 1 << 20;

struct Value {
  int64_t channels, height, width;
  int64_t halo_h = 0, halo_w = 0;
  bool is_residual = false;
  int64_t last_use = 0;  // index of the layer that reads it last
  int64_t slot = -1;  // or -1: the value lives in a tensor
};

struct Geometry {
  std::vector<Value> values;
  std::vector<MapShape> slots;
  std::vector<int64_t> slot_begin;  // in elements, for one image
  int64_t image_numel = 0;
};

int64_t output_size(int64_t size, int64_t pad, int64_t kernel, int64_t stride) {
  return (size + 2 * pad - kernel) / stride + 1;
}

std::vector<Value> infer_values(const char* op, const std::vector<Tensor>& inputs, const std::vector<Layer>& layers) {
  std::vector<Value> values;
  for (const Tensor& x : inputs) values.push_back({x.size(1), x.size(2), x.size(3)});
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& l = layers[i];
    const int64_t known = static_cast<int64_t>(values.size());
    RESNET_FAST_CHECK(l.input >= 0 && l.input < known && l.residual >= -1 && l.residual < known, op, ": layer ", i,
                      " reads values ", l.input, " and ", l.residual, ", want values below ", known);
    RESNET_FAST_CHECK(l.out_channels > 0 && l.kernel_h > 0 && l.kernel_w > 0 && l.kernel_h * l.kernel_w <= kMaxRuns,
                      op, ": layer ", i, " has a filter of ", l.out_channels, " x ", l.kernel_h, " x ", l.kernel_w);
    RESNET_FAST_CHECK(l.stride_h > 0 && l.stride_w > 0, op, ": stride is ", l.stride_h, " x ", l.stride_w,
                      ", want at least 1");
    RESNET_FAST_CHECK(l.pad_h >= 0 && l.pad_w >= 0, op, ": padding is ", l.pad_h, " x ", l.pad_w,
                      ", want at least 0");
    Value& x = values[static_cast<size_t>(l.input)];
    RESNET_FAST_CHECK(x.height + 2 * l.pad_h >= l.kernel_h && x.width + 2 * l.pad_w >= l.kernel_w, op, ": x is ",
                      x.height, " x ", x.width, " with padding ", l.pad_h, " x ", l.pad_w,
                      ", smaller than the filter, ", l.kernel_h, " x ", l.kernel_w);
    x.halo_h = std::max(x.halo_h, l.pad_h);
    x.halo_w = std::max(x.halo_w, l.pad_w);
    x.last_use = static_cast<int64_t>(i);
    Value y{l.out_channels, output_size(x.height, l.pad_h, l.kernel_h, l.stride_h),
            output_size(x.width, l.pad_w, l.kernel_w, l.stride_w)};
    if (l.residual >= 0) {
      Value& r = values[static_cast<size_t>(l.residual)];
      RESNET_FAST_CHECK(r.channels == y.channels && r.height == y.height && r.width == y.width, op,
                        ": residual is [", r.channels, ", ", r.height, ", ", r.width, "] per image, want [",
                        y.channels, ", ", y.height, ", ", y.width, "] as the convolution gives");
      r.is_residual = true;
      r.last_use = static_cast<int64_t>(i);
    }
    values.push_back(y);
  }
  values.back().last_use = static_cast<int64_t>(layers.size());
  return values;
}

// Can the kernels read this tensor where it is? Dense channels, the right type, no halo, whole vectors if it is added.
template <typename T>
bool readable_in_place(const Tensor& x, const Value& v, int64_t lanes) {
  const bool type = x.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
  return type && x.stride(1) == 1 && v.halo_h == 0 && v.halo_w == 0 && (!v.is_residual || v.channels % lanes == 0);
}

// Gives each value a slot of scratch memory; a slot is used again once its value is dead.
template <typename T>
Geometry place(const std::vector<Tensor>& inputs, std::vector<Value> values, bool direct_output) {
  const int64_t lanes = kernels_in_use<T>().lanes;
  Geometry g;
  std::vector<int64_t> free_after;  // last use of the value in each slot
  for (size_t i = 0; i < values.size(); ++i) {
    Value& v = values[i];
    const bool input = i < inputs.size();
    if (input ? readable_in_place<T>(inputs[i], v, lanes) : direct_output && i + 1 == values.size()) continue;
    // An input keeps its pixels close together unless whole vectors of it are added: filter rows become single runs.
    const int64_t pixel = input && !v.is_residual ? v.channels : round_up(v.channels, lanes);
    const MapShape shape{v.channels, v.height, v.width, pixel, v.halo_h, v.halo_w};
    const int64_t born = static_cast<int64_t>(i) - static_cast<int64_t>(inputs.size());
    size_t slot = 0;
    while (slot < g.slots.size() && !(g.slots[slot] == shape && free_after[slot] < born)) ++slot;
    if (slot == g.slots.size()) {
      g.slots.push_back(shape);
      g.slot_begin.push_back(g.image_numel);
      free_after.push_back(0);
      // Whole vectors at the end of the last pixel may reach past it.
      g.image_numel += round_up(shape.image(), 64) + 64;
    }
    free_after[slot] = v.last_use;
    v.slot = static_cast<int64_t>(slot);
  }
  g.values = std::move(values);
  return g;
}

// A part of the output of a layer: pixels of the images at hand, counted through, and panels of output channels.
struct Part {
  int64_t pixel_begin, pixel_end, panel_begin, panel_end;
};

template <typename T>
void convolve(const Layer& l, const FilterLayout<T>& layout, const T* packed, const Value& in, const Value& out,
              const Map<T>& x, const Map<T>* residual, const Map<T>& y, const Part& part) {
  const ConvKernels<T>& kernels = kernels_in_use<T>();
  ConvCall<T> call{};
  call.filter = packed + layout.bias_numel();
  call.bias = packed;
  call.panel_begin = static_cast<int>(part.panel_begin);
  call.panel_end = static_cast<int>(part.panel_end);
  call.out_vectors = static_cast<int>(layout.padded_out() / layout.lanes);
  call.panel_stride = layout.panel_stride();
  call.relu = l.relu != 0;

  int64_t run_offset[kMaxRuns];
  const bool whole_rows = layout.block() == in.channels && x.pixel == in.channels;
  call.runs = static_cast<int>(whole_rows ? l.kernel_h : layout.taps());
  call.channels = static_cast<int>(whole_rows ? l.kernel_w * in.channels : in.channels);
  call.block = static_cast<int>(whole_rows ? call.channels : layout.block());
  const int64_t columns = whole_rows ? 1 : l.kernel_w;
  for (int i = 0; i < call.runs; ++i) run_offset[i] = (i / columns) * x.row + (i % columns) * x.pixel;
  call.run_offset = run_offset;

  call.input = x.origin - l.pad_h * x.row - l.pad_w * x.pixel;
  call.output = y.origin;
  call.residual = residual ? residual->origin : nullptr;
  int64_t input_offset[kMaxPixels], residual_offset[kMaxPixels], output_offset[kMaxPixels];
  call.input_offset = input_offset;
  call.residual_offset = residual_offset;
  call.output_offset = output_offset;

  const int64_t total = part.pixel_end - part.pixel_begin;
  const int64_t step = round_up(ceil_div(total, ceil_div(total, kMaxPixels)), kernels.tile_pixels);
  for (int64_t begin = part.pixel_begin; begin < part.pixel_end; begin += step) {
    call.pixels = static_cast<int>(std::min(step, part.pixel_end - begin));
    int64_t w = begin % out.width, h = begin / out.width % out.height, n = begin / out.width / out.height;
    for (int p = 0; p < call.pixels; ++p) {
      input_offset[p] = n * x.image + h * l.stride_h * x.row + w * l.stride_w * x.pixel;
      output_offset[p] = n * y.image + h * y.row + w * y.pixel;
      if (residual) residual_offset[p] = n * residual->image + h * residual->row + w * residual->pixel;
      if (++w == out.width) {
        w = 0;
        if (++h == out.height) h = 0, ++n;
      }
    }
    kernels.conv(call);
  }
}

// The chain on `images` images from `first` on, in scratch memory of its own.
template <typename T>
class Chain {
 public:
  Chain(const std::vector<Tensor>& inputs, const std::vector<Tensor>& filters, const std::vector<Layer>& layers,
        const Geometry& geometry, const Tensor& output, T* scratch, int64_t first, int64_t images)
      : inputs_(inputs), filters_(filters), layers_(layers), g_(geometry), output_(output), scratch_(scratch),
        first_(first), images_(images) {}

  // `parts` threads share each step; with one, everything happens here.
  void run(int64_t parts) const {
    parallel(parts, [&](int64_t part) {
      for (size_t s = static_cast<size_t>(part); s < g_.slots.size(); s += static_cast<size_t>(parts)) {
        g_.slots[s].clear_halo(slot_data(s), images_);
      }
    });
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (g_.values[i].slot < 0) continue;
      const MapShape& shape = slot_of(g_.values[i]);
      const int64_t rows = images_ * shape.height;
      parallel(parts, [&](int64_t part) {
        copy_in(inputs_[i], first_, map(i), shape, rows * part / parts, rows * (part + 1) / parts);
      });
    }
    for (size_t i = 0; i < layers_.size(); ++i) layer(i, parts);
    const Value& last = g_.values.back();
    if (last.slot >= 0) {
      const MapShape& shape = slot_of(last);
      const int64_t rows = images_ * shape.height;
      parallel(parts, [&](int64_t part) {
        copy_out(map(g_.values.size() - 1), shape, output_, first_, rows * part / parts, rows * (part + 1) / parts);
      });
    }
  }

 private:
  template <typename Body>
  static void parallel(int64_t parts, const Body& body) {
    if (parts == 1) return body(0);
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) body(part);
    });
  }

  const MapShape& slot_of(const Value& v) const { return g_.slots[static_cast<size_t>(v.slot)]; }
  T* slot_data(size_t slot) const { return scratch_ + g_.slot_begin[slot] * images_; }

  Map<T> map(size_t value) const {
    const Value& v = g_.values[value];
    if (v.slot >= 0) return slot_of(v).map(slot_data(static_cast<size_t>(v.slot)));
    if (value < inputs_.size()) {
      const Tensor& x = inputs_[value];
      T* data = static_cast<T*>(x.data_ptr());
      return {data + first_ * x.stride(0), x.stride(0), x.stride(2), x.stride(3)};
    }
    const int64_t row = v.width * v.channels, image = v.height * row;
    return {static_cast<T*>(output_.data_ptr()) + first_ * image, image, row, v.channels};
  }

  void layer(size_t i, int64_t parts) const {
    const Layer& l = layers_[i];
    const Value& in = g_.values[static_cast<size_t>(l.input)];
    const Value& out = g_.values[inputs_.size() + i];
    const FilterLayout<T> layout{l.out_channels, in.channels, l.kernel_h, l.kernel_w};
    const T* packed = static_cast<const T*>(filters_[i].data_ptr());
    const Map<T> x = map(static_cast<size_t>(l.input)), y = map(inputs_.size() + i);
    const Map<T> residual = l.residual >= 0 ? map(static_cast<size_t>(l.residual)) : Map<T>{};
    const int64_t pixels = images_ * out.height * out.width, panels = layout.panels();
    const bool split_panels =
        panels >= parts && (panels % parts == 0 || panels >= 4 * parts) &&
        layout.numel() * static_cast<int64_t>(sizeof(T)) >= kSplitFilterBytes;
    const int64_t tile = kernels_in_use<T>().tile_pixels, tiles = ceil_div(pixels, tile);
    parallel(parts, [&](int64_t p) {
      const Part part = split_panels ? Part{0, pixels, panels * p / parts, panels * (p + 1) / parts}
                                     : Part{tiles * p / parts * tile, std::min(tiles * (p + 1) / parts * tile, pixels),
                                            0, panels};
      if (part.pixel_begin < part.pixel_end && part.panel_begin < part.panel_end) {
        convolve(l, layout, packed, in, out, x, l.residual >= 0 ? &residual : nullptr, y, part);
      }
    });
  }

  const std::vector<Tensor>& inputs_;
  const std::vector<Tensor>& filters_;
  const std::vector<Layer>& layers_;
  const Geometry& g_;
  const Tensor& output_;
  T* scratch_;
  int64_t first_, images_;
};

template <typename T>
void check_filters(const char* op, const std::vector<Tensor>& filters, const std::vector<Layer>& layers,
                   const std::vector<Value>& values) {
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& l = layers[i];
    const FilterLayout<T> layout{l.out_channels, values[static_cast<size_t>(l.input)].channels, l.kernel_h, l.kernel_w};
    const ScalarType type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
    RESNET_FAST_CHECK(filters[i].scalar_type() == type && filters[i].is_contiguous() && filters[i].is_cpu() &&
                          filters[i].numel() == layout.numel(),
                      op, ": filters[", i, "] is not what pack_conv_bn gives for a weight of [", l.out_channels, ", ",
                      layout.channels, ", ", l.kernel_h, ", ", l.kernel_w, "] and inputs of ", dtype_name(type));
  }
}

template <typename T>
Tensor run(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& filters,
           const std::vector<Layer>& layers) {
  std::vector<Value> values = infer_values(op, inputs, layers);
  check_filters<T>(op, filters, layers, values);

  const Tensor& x = inputs[0];
  const int64_t images = x.size(0);
  const int64_t size[] = {images, values.back().channels, values.back().height, values.back().width};
  Tensor output = torch::stable::empty({size, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                       torch::headeronly::MemoryFormat::ChannelsLast);
  if (images == 0) return output;

  const bool same_type = x.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
  int64_t min_pixels = values.back().height * values.back().width;
  for (const Value& v : values) min_pixels = std::min(min_pixels, v.height * v.width);
  const Geometry geometry =
      place<T>(inputs, std::move(values), same_type && size[1] % kernels_in_use<T>().lanes == 0);

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t each = images / threads, rest = images % threads;
  const int64_t group = std::clamp<int64_t>(ceil_div(kMinPixels, min_pixels), 1, std::max<int64_t>(each, 1));
  const int64_t carried = each > 0 ? group * threads : 0;
  const int64_t scratch_size[] = {std::max(carried, rest) * geometry.image_numel};
  Tensor scratch = torch::stable::empty({scratch_size, 1}, filters[0].scalar_type(), std::nullopt, x.device());
  T* data = static_cast<T*>(scratch.data_ptr());

  if (each > 0) {
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* own = data + t * group * geometry.image_numel;
        for (int64_t first = t * each; first < (t + 1) * each; first += group) {
          const int64_t count = std::min(group, (t + 1) * each - first);
          Chain<T>(inputs, filters, layers, geometry, output, own, first, count).run(1);
        }
      }
    });
  }
  if (rest > 0) Chain<T>(inputs, filters, layers, geometry, output, data, images - rest, rest).run(threads);
  return output;
}

}  // namespace

Tensor run_stage(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& filters,
                 const std::vector<Layer>& layers) {
  const Tensor& x = inputs[0];
  check_rank(op, "x", x, 4, "[batch, channels, height, width]");
  check_dtype(op, "x", x);
  for (size_t i = 1; i < inputs.size(); ++i) {
    check_rank(op, "residual", inputs[i], 4, "[batch, channels, height, width]");
    check_same_dtype(op, "residual", inputs[i], "x", x);
    RESNET_FAST_CHECK(inputs[i].size(0) == x.size(0), op, ": residual has shape ", shape(inputs[i]),
                      ", want a batch of ", x.size(0), " as x has");
    RESNET_FAST_CHECK(inputs[i].is_cpu(), op, ": residual is not on the CPU, as x is");
  }
  RESNET_FAST_CHECK(!layers.empty() && layers.size() == filters.size(), op, ": ", layers.size(), " layers and ",
                    filters.size(), " filters, want as many of both and at least one");
  RESNET_FAST_CHECK(x.size(1) > 0, op, ": x has shape ", shape(x), ", want at least 1 channel");
  return x.scalar_type() == ScalarType::Double ? run<double>(op, inputs, filters, layers)
                                               : run<float>(op, inputs, filters, layers);
}

}  // namespace resnet_fast
