// Schedules a chain of convolutions over memory and threads.
//
// Depth first, where filters are small: each thread carries a few images through the whole chain, and their activations
// stay in its own cache. Layer by layer, where filters are large or images fewer than threads: the threads of a team
// share each layer, and every filter is read once for many images. Both orders do the same arithmetic for each output:
// results do not depend on the number of threads.
#include "cpu/conv/chain.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <utility>

#include "checks.h"
#include "cpu/conv/chain_layout.h"
#include "cpu/conv/pool_output.h"
#include "cpu/conv/run_convolution.h"
#include "cpu/kept_memory.h"
#include "cpu/thread_team.h"

namespace resnet_fast {
namespace {

using torch::stable::parallel_for;

// Pixels of a layer that keep a thread from waiting for filters: enough images are carried together.
constexpr int64_t kMinPixels = 192;
// Filters of a chain that may be read again for each batch of images: they stay in the last-level cache.
constexpr int64_t kCarriedFilterBytes = 8 << 20;
// Activations of the images that a team works on at a time: they should stay in the last-level cache, too.
constexpr int64_t kTeamActivationBytes = 16 << 20;

// The chain on `images` images from `first` on. Scratch memory: `activations` of all images, and `work` for the
// transforms of this thread.
template <typename T>
class Chain {
 public:
  const std::vector<Tensor>& inputs;
  const std::vector<Tensor>& filters;
  const std::vector<Layer>& layers;
  const ChainLayout& layout;
  const Tensor& output;
  const Pool* pool;
  const Value& result;  // the shape of an image of the output
  std::atomic<bool>& spread;  // see Convolution

  // Every thread of the team calls this.
  void run(int64_t first, int64_t images, T* activations, T* work, int64_t rank, ThreadTeam& team) const {
    const int64_t size = team.size();
    const auto rows_of = [&](int64_t height, const auto& body) {
      const int64_t rows = images * height;
      body(rows * rank / size, rows * (rank + 1) / size);
    };
    for (size_t s = static_cast<size_t>(rank); s < layout.slots.size(); s += static_cast<size_t>(size)) {
      layout.slots[s].clear_halo(activations + layout.slot_begin[s] * images, images);
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (layout.values[i].slot < 0) continue;
      const PaddedLayout& shape = slot_of(layout.values[i]);
      rows_of(shape.height, [&](int64_t begin, int64_t end) {
        copy_in(inputs[i], first, view(i, first, images, activations), shape, begin, end);
      });
    }
    team.wait();
    for (size_t i = 0; i < layers.size(); ++i) {
      const Convolution<T> conv = convolution(i, first, images, activations);
      run_part(conv, part_of(conv, rank, size), work);
      team.wait();
    }
    const Value& last = layout.values.back();
    if (last.slot < 0) return;
    rows_of(result.height, [&](int64_t begin, int64_t end) {
      const ActivationView<T> from = view(layout.values.size() - 1, first, images, activations);
      if (pool) {
        pool_output(from, slot_of(last), *pool, result, output, first, begin, end);
      } else {
        copy_out(from, slot_of(last), output, first, begin, end);
      }
    });
  }

  // Elements of `work` for each thread.
  int64_t work_numel(int64_t images) const {
    int64_t most = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      const Convolution<T> conv = convolution(i, 0, images, nullptr);
      if (conv.layout.winograd()) most = std::max(most, winograd_scratch(conv));
    }
    return round_up(most, 64);
  }

 private:
  const PaddedLayout& slot_of(const Value& v) const { return layout.slots[static_cast<size_t>(v.slot)]; }

  ActivationView<T> view(size_t value, int64_t first, int64_t images, T* activations) const {
    const Value& v = layout.values[value];
    if (v.slot >= 0) return slot_of(v).view(activations + layout.slot_begin[static_cast<size_t>(v.slot)] * images);
    if (value < inputs.size()) {
      const Tensor& x = inputs[value];
      return {static_cast<T*>(x.data_ptr()) + first * x.stride(0), x.stride(0), x.stride(2), x.stride(3)};
    }
    const int64_t row = v.width * v.channels, image = v.height * row;
    return {static_cast<T*>(output.data_ptr()) + first * image, image, row, v.channels};
  }

  Convolution<T> convolution(size_t i, int64_t first, int64_t images, T* activations) const {
    const Layer& l = layers[i];
    const Value& in = layout.values[static_cast<size_t>(l.input)];
    const Value& out = layout.values[inputs.size() + i];
    const ActivationView<T> none{};
    return {l,
            read_layout<T>("residual_stage", i, l, in.channels, filters[i]),
            static_cast<const T*>(filters[i].data_ptr()),
            images,
            out.height,
            out.width,
            view(static_cast<size_t>(l.input), first, images, activations),
            l.residual >= 0 ? view(static_cast<size_t>(l.residual), first, images, activations) : none,
            view(inputs.size() + i, first, images, activations),
            false,
            {},
            &spread};
  }
};

thread_local bool last_run_spread = false;

template <typename T>
Tensor run(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& filters,
           const std::vector<Layer>& layers, const Pool* pool) {
  std::vector<Value> values = infer_values<T>(op, inputs, filters, layers);

  const Tensor& x = inputs[0];
  const int64_t images = x.size(0);
  const Value result = pool ? pooled_shape(op, values.back(), *pool) : values.back();
  Tensor output = empty_tensor({images, result.channels, result.height, result.width}, x.scalar_type());
  if (images == 0) return output;

  const bool same_type = x.scalar_type() == kScalarType<T>;
  int64_t min_pixels = values.back().height * values.back().width;
  for (const Value& v : values) min_pixels = std::min(min_pixels, v.height * v.width);
  const ChainLayout layout = assign_slots<T>(inputs, std::move(values),
                                             !pool && same_type && result.channels % kernels_in_use<T>().lanes == 0);

  std::atomic<bool> spread{false};
  const Chain<T> chain{inputs, filters, layers, layout, output, pool, result, spread};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t image_numel = layout.image_numel, each = images / threads;
  int64_t filter_bytes = 0;
  for (const Tensor& filter : filters) filter_bytes += filter.numel() * static_cast<int64_t>(sizeof(T));

  const int64_t carried = filter_bytes <= kCarriedFilterBytes ? each * threads : 0;
  const int64_t batch = std::clamp<int64_t>(ceil_div(kMinPixels, min_pixels), 1, std::max<int64_t>(each, 1));
  const int64_t batch_work = carried > 0 ? chain.work_numel(batch) : 0;
  const int64_t team_fit =
      std::max<int64_t>(kTeamActivationBytes / (image_numel * static_cast<int64_t>(sizeof(T)) + 1), 1);
  const int64_t team_images = std::min(images - carried, team_fit);
  const int64_t team_work = team_images > 0 ? chain.work_numel(team_images) : 0;
  Tensor scratch = empty_tensor({std::max(carried > 0 ? threads * (batch * image_numel + batch_work) : 0,
                                          team_images * image_numel + threads * team_work)},
                                filters[0].scalar_type());
  T* data = static_cast<T*>(scratch.data_ptr());

  if (carried > 0) {
    // A free thread takes the next batch: cores need not be equally fast.
    std::atomic<int64_t> next{0};
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      T* activations = data + begin * (batch * image_numel + batch_work);
      ThreadTeam alone;
      for (int64_t first; (first = next.fetch_add(batch)) < carried;) {
        chain.run(first, std::min(batch, carried - first), activations, activations + batch * image_numel, 0, alone);
      }
    });
  }
  if (carried < images) {
    ThreadTeam::run(threads, [&](int64_t rank, ThreadTeam& team) {
      T* work = data + team_images * image_numel + rank * team_work;
      for (int64_t first = carried; first < images; first += team_images) {
        chain.run(first, std::min(team_images, images - first), data, work, rank, team);
        team.wait();
      }
    });
  }
  last_run_spread = spread.load();
  return output;
}

}  // namespace

bool take_spread() { return std::exchange(last_run_spread, false); }

Tensor run_chain(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& filters,
                 const std::vector<Layer>& layers, const Pool* pool) {
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
  RESNET_FAST_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": x has shape ", shape(x),
                    ", want at least 1 channel and 1 pixel");
  check_defined(op, "filters[0]", filters[0]);
  if (filters[0].scalar_type() == ScalarType::BFloat16) {
    RESNET_FAST_CHECK(x.scalar_type() == ScalarType::BFloat16, op, ": x has dtype ", dtype_name(x.scalar_type()),
                      ", want bfloat16 as filters[0] has");
    return run<BFloat16>(op, inputs, filters, layers, pool);
  }
  return x.scalar_type() == ScalarType::Double ? run<double>(op, inputs, filters, layers, pool)
                                               : run<float>(op, inputs, filters, layers, pool);
}

}  // namespace resnet_fast
