// Every schema of the library, once. Kernels register themselves under their dispatch key in cpu/ and cuda/.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "chain/tape.h"
#include "cpu/conv/chain.h"
#include "staleness_guard.h"
#include "tensor_state.h"

STABLE_TORCH_LIBRARY(resnet_fast, m) {
  // y = relu(a + b)
  m.def("add_relu(Tensor a, Tensor b) -> Tensor");

  // y = [relu](batch_norm(conv2d(x, weight, bias)) [+ residual]), batch norm by the running statistics
  m.def(
      "conv_bn(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, int[2] stride, int[2] padding) -> Tensor");
  m.def(
      "conv_bn_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, int[2] stride, int[2] padding) -> Tensor");
  m.def(
      "conv_bn_add_relu(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? running_mean, Tensor? running_var, float eps, int[2] stride, int[2] padding) -> Tensor");

  // Batch norm folded into the weights, in the layout that conv_chain reads. It depends on the CPU: never store it.
  // algorithm: 0 for direct convolution; for 3x3 filters with stride 1 also 1 for Winograd's F(4x4, 3x3), and 2 for the
  // same with filters that are transformed when they are used, a quarter of the size. 3 and 4 multiply in bfloat16, for
  // activations in bfloat16: direct convolution, and for 3x3 filters with stride 1 Winograd's F(2x2, 3x3).
  m.def(
      "pack_conv_bn(Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, int algorithm=0) -> Tensor");
  // A chain of convolutions, one packed filter and kLayerFields integers (cpu/conv/chain.h) each.
  m.def("conv_chain(Tensor x, Tensor[] filters, int[] layers, int[] pool=[]) -> Tensor");

  // The chain of a network made of residual stages, a launch for each stage, from filters that residual_network.py
  // packs; the last map, or where classes > 0 the scores of a linear layer behind its average pooling. CUDA only.
  m.def("residual_network(Tensor x, Tensor packed, int[] layers, int classes=0) -> Tensor");
  // The kernels of a stage, seven integers each: what it begins with (0 an image and the stem, 1 a map, 2 a strided
  // block), bytes of a channel, channels, height and width, images, threads and bytes of shared memory a block; and a
  // launch of one.
  m.def("residual_stage_kernels() -> int[]");
  m.def(
      "residual_stage_launch(int kernel, Tensor x, Tensor filters, Tensor(a!) y, int blocks, int classes, bool "
      "channels_last) -> ()");

  // Training. A batch norm is [scale; shift] of its convolution's output y, applied where y is read.
  // y = conv2d([relu](scale * x + shift), weight, bias), and [mean; variance] of y
  m.def(
      "conv_bn_stats(Tensor x, Tensor? scale_shift, bool relu, Tensor weight, Tensor? bias, int[2] stride, int[2] "
      "padding, int algorithm, bool stats) -> (Tensor, Tensor)");
  // [relu](scale * y + shift [+ residual [* its scale + its shift]])
  m.def("bn_apply(Tensor y, Tensor scale_shift, Tensor? residual, Tensor? residual_scale_shift, bool relu) -> Tensor");
  // g = grad where relu_source [* scale + shift] > 0, else 0, and its sums over pixels: of g, and of g * (y - mean) for
  // up to two ys; stats are [mean; variance].
  m.def(
      "bn_backward_reduce(Tensor grad, Tensor? relu_source, Tensor? scale_shift, Tensor[] ys, Tensor[] stats) -> "
      "(Tensor, "
      "Tensor)");
  // Sums over images and pixels: the gradient of a bias.
  m.def("channel_sums(Tensor grad) -> Tensor");
  // Gradients of conv_bn_stats' convolution for dy = a * grad + b * (y - mean) + constant, coefficients = [a; b;
  // constant; mean], or for dy = grad: of its input before scale_shift is applied to it (plus residual), and of the
  // weight. With reduce, the first goes on through bn_backward_reduce.
  m.def(
      "conv_backward(Tensor grad, Tensor? y, Tensor? coefficients, Tensor x, Tensor? scale_shift, bool relu, Tensor "
      "weight, int[2] stride, int[2] padding, int algorithm, bool need_x, bool need_weight, Tensor? residual, bool "
      "reduce, Tensor[] ys, Tensor[] stats) -> (Tensor, Tensor, Tensor)");

  // Max pooling, and for its backward the place of each result in its window, two in a byte. CPU only.
  m.def("max_pool(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode) -> (Tensor, Tensor)");
  m.def(
      "max_pool_backward(Tensor grad, Tensor argmax, int[2] size, int[2] kernel, int[2] stride, int[2] padding) -> "
      "Tensor");

  // A chain of those as one operator for torch.compile, in Python (resnet_fast/chain/training/operator.py).
  m.def(
      "train_chain(Tensor x, Tensor[] tensors, bool[] present, int[] fields, float[] eps, bool[] batch, bool "
      "recompute) -> Tensor[]");
  m.def(
      "train_chain_backward(Tensor grad, Tensor x, Tensor[] tensors, Tensor[] saved, bool[] present, int[] fields, "
      "float[] eps, bool[] batch, bool[] needs) -> Tensor[]");

  // y[n, k, h, w] = table[k, pixel of image index[n]], zeros for index -1; with a stream of random numbers
  // (resnet_fast/program/data/augment.py) shifted by up to `padding` and, with flip, half of them mirrored.
  m.def("augment(Tensor images, Tensor index, Tensor table, int? stream, int padding, bool flip) -> Tensor");

  // conv_bn_relu on CUDA devices: the tiles (cuda/conv/conv_plan.h); the geometry of a launch as [blocks, threads,
  // shared bytes, floats and counters of the split-K workspace, completed args]; the launch, whose counters are zero
  // before and after.
  m.def("conv_bn_relu_tiles() -> int[]");
  m.def("conv_bn_relu_plan(int tile, int[] args, int element_size, bool aligned) -> int[]");
  m.def(
      "conv_bn_relu_launch(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor(a!) y, "
      "Tensor(b!)? partial, Tensor(c!)? counters, int tile, int[] args) -> ()");

  // The same for 3x3 convolutions of 16 bits on Hopper (cuda/hopper/conv_halo_plan.h); a tile is its positions,
  // warpgroups and stages.
  m.def("conv_halo_tiles() -> int[]");
  m.def("conv_halo_plan(int tile, int[] args) -> int[]");
  m.def(
      "conv_halo_launch(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor(a!) y, "
      "Tensor(b!)? partial, Tensor(c!)? counters, int tile, int[] args) -> ()");

  // The same for 1x1 convolutions (cuda/hopper/conv1x1_plan.h); a tile is its pixels, warpgroups and blocks.
  m.def("conv1x1_tiles() -> int[]");
  m.def("conv1x1_plan(int tile, int[] args) -> int[]");
  m.def(
      "conv1x1_launch(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor(a!) y, "
      "Tensor(b!)? partial, Tensor(c!)? counters, int tile, int[] args) -> ()");

  // The 3x3 convolutions of training on Hopper (cuda/hopper/training/plan.h): tiles and plans as above, for
  // the forward pass or the data gradient; the launches.
  m.def("conv_halo_training_tiles() -> int[]");
  m.def("conv_halo_training_plan(int tile, int[] args, bool gradient) -> int[]");
  m.def(
      "conv_halo_stats_launch(Tensor x, Tensor? scale_shift, Tensor weight, Tensor? bias, Tensor(a!) y, "
      "Tensor(b!)? partial, int tile, int[] args) -> ()");
  m.def(
      "conv_halo_gradient_launch(Tensor grad, Tensor? y, Tensor? coefficients, Tensor weight, Tensor? residual, "
      "Tensor? x, Tensor? scale_shift, Tensor? y1, Tensor? y2, Tensor? stats1, Tensor? stats2, Tensor(a!) dx, "
      "Tensor(b!)? partial, int tile, int[] args) -> ()");

  // The weight gradient of 3x3 convolutions of 16 bits on Hopper (cuda/hopper/weight_gradient_plan.h); a tile is its
  // rows, columns, steps and stages. partial: float32 [splits, K, 3, 3, C].
  m.def("weight_gradient_tiles() -> int[]");
  m.def("weight_gradient_plan(int tile, int[] args) -> int[]");
  m.def(
      "weight_gradient_launch(Tensor grad, Tensor? y, Tensor? coefficients, Tensor x, Tensor? scale_shift, "
      "Tensor(a!) partial, int tile, int[] args) -> ()");

  // PyTorch's current stream on the device of x, and the CUDA graph capture that it takes part in, 0 if none.
  m.def("current_capture(Tensor x) -> int[]");

  // A stem's convolution and max pooling on CUDA devices: the kernels (cuda/stem/conv_bn_relu_pool_plan.h) as filter,
  // whether windows overlap, whether it is SIMT; the geometry of a launch as [blocks, threads, shared bytes, completed
  // args]; the launch.
  m.def("conv_bn_relu_pool_kernels() -> int[]");
  m.def(
      "conv_bn_relu_pool_plan(int kernel, int[] args, int element_size, bool aligned, int multiprocessors, int shared) "
      "-> int[]");
  m.def(
      "conv_bn_relu_pool_launch(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor(a!) y, int kernel, int "
      "blocks, int[] args) -> ()");

  // y = flatten(avg_pool2d(x, kernel, stride), 1) on CUDA devices, of x in channels_last.
  m.def("avg_pool_flatten_launch(Tensor x, Tensor(a!) y, int[2] kernel, int[2] stride) -> ()");

  // Replays tape `number` (chain/tape.h) for these inputs; returns no tensors if it was recorded with inputs of another
  // kind.
  m.def("run_tape(Tensor[] inputs, int number) -> Tensor[]");

  // The address of PyTorch's current stream on a CUDA device; 0 for the default stream. Raises if there is no device.
  m.def("cuda_stream(int device) -> int");

  // Whether freed memory of activations is kept for the next ones (cpu/kept_memory.cpp); bytes kept, and bytes in use.
  m.def("keep_memory(bool keep) -> ()");
  m.def("kept_memory() -> int[]");

  // The instruction set in use, as the Isa of cpu/isa.h: the stable ABI returns no strings.
  m.def("cpu_isa() -> int");
  // Whether the CPU has instructions for products of bfloat16, and may use them.
  m.def("cpu_multiplies_bf16() -> bool");
}

static PyObject* take_spread(PyObject*, PyObject*) { return PyBool_FromLong(resnet_fast::take_spread()); }

// Importing the module runs the registrations.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"unchanged", is_valid, METH_O, nullptr},
                                  {"tensor_state", tensor_state, METH_VARARGS, nullptr},
                                  {"tape", resnet_fast::add_tape, METH_VARARGS, nullptr},
                                  {"drop_tape", resnet_fast::drop_tape, METH_O, nullptr},
                                  {"kernel", resnet_fast::kernel, METH_O, nullptr},
                                  {"take_spread", take_spread, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* made = PyModule_Create(&module);
  // The release whose headers the build saw, and the first that the result loads into, as major * 256 + minor.
  if (made == nullptr || PyModule_AddStringConstant(made, "built_with", TORCH_VERSION) != 0 ||
      PyModule_AddIntConstant(made, "target", static_cast<long>(TORCH_TARGET_VERSION >> 48)) != 0) {
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
