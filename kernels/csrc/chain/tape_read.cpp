// Reads a tape from the words that resnet_fast/gpu/recorder.py writes, and checks it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

#include "chain/tape.h"
#include "chain/tape_tensors.h"
#include "checks.h"

namespace resnet_fast {
namespace {

// Reads words in the order in which the recorder writes them.
class Reader {
 public:
  Reader(const char* data, size_t bytes) : data_(data), words_(bytes / 8) {}

  int64_t word() {
    RESNET_FAST_CHECK(at_ < words_, "tape: it ends in the middle, after ", words_, " words");
    int64_t value;
    std::memcpy(&value, data_ + 8 * at_++, 8);
    return value;
  }
  // A count or an index: from 0 to end - 1.
  int64_t bounded(int64_t end, const char* what) {
    const int64_t value = word();
    RESNET_FAST_CHECK(value >= 0 && value < end, "tape: ", what, " is ", value, ", want 0 to ", end - 1);
    return value;
  }
  int64_t count() { return bounded(static_cast<int64_t>(words_) + 1, "a count"); }
  std::vector<int64_t> list() {
    std::vector<int64_t> values(static_cast<size_t>(count()));
    for (int64_t& value : values) value = word();
    return values;
  }
  // A size and that many bytes, padded to whole words.
  std::string bytes() {
    const auto size = static_cast<size_t>(bounded(static_cast<int64_t>(8 * words_) + 1, "a size"));
    RESNET_FAST_CHECK(size <= 8 * (words_ - at_), "tape: it ends in the middle, after ", words_, " words");
    std::string value(data_ + 8 * at_, size);
    at_ += (size + 7) / 8;
    return value;
  }
  bool done() const { return at_ == words_; }

 private:
  const char* data_;
  size_t words_, at_ = 0;
};

View read_view(Reader& in, int64_t buffers) {
  View view;
  view.buffer = in.bounded(buffers, "a buffer");
  view.dtype = in.word();
  view.offset = in.word();
  view.sizes = in.list();
  view.strides = in.list();
  RESNET_FAST_CHECK(view.sizes.size() == view.strides.size(), "tape: a view has ", view.sizes.size(), " sizes and ",
                    view.strides.size(), " strides");
  return view;
}

Launch read_launch(Reader& in, const std::vector<Buffer>& buffers) {
  Launch launch;
  launch.function = static_cast<uintptr_t>(in.word());
  launch.driver = in.bounded(2, "a launch's kind") == 1;
  for (unsigned& size : launch.grid) size = static_cast<unsigned>(in.bounded(int64_t{1} << 31, "a grid"));
  launch.threads = static_cast<unsigned>(in.bounded(1025, "the threads"));
  launch.shared = static_cast<unsigned>(in.bounded(1 << 20, "the shared memory"));
  const int64_t parameters = in.bounded(kParameters, "the number of parameters");
  for (int64_t i = 0; i < parameters; ++i) {
    launch.begins.push_back(static_cast<int64_t>(launch.bytes.size()));
    if (in.bounded(2, "a parameter's kind") == 1) {
      const int64_t buffer = in.bounded(static_cast<int64_t>(buffers.size()), "a buffer");
      const Buffer& b = buffers[static_cast<size_t>(buffer)];
      const int64_t offset = in.bounded(b.bytes + 1, "an offset"),
                    extent = in.bounded(b.bytes - offset + 1, "an extent");
      launch.pointers.push_back({i, buffer, offset, extent});
      launch.bytes.resize(launch.bytes.size() + 8);
    } else {
      const std::string value = in.bytes();
      launch.bytes.insert(launch.bytes.end(), value.begin(), value.end());
      launch.bytes.resize((launch.bytes.size() + 7) / 8 * 8);
    }
  }
  RESNET_FAST_CHECK(launch.bytes.size() <= kParameterBytes, "tape: a launch has ", launch.bytes.size(),
                    " bytes of parameters, want at most ", kParameterBytes);
  return launch;
}

Call read_call(Reader& in, int64_t views) {
  Call call;
  call.name = in.bytes();
  call.overload = in.bytes();
  for (int64_t i = in.count(); i > 0; --i) {
    Call::Argument a{};
    a.kind = static_cast<Call::Argument::Kind>(in.bounded(Call::Argument::kDtype + 1, "an argument's kind"));
    a.optional = in.bounded(2, "whether an argument is optional") == 1;
    if (a.kind == Call::Argument::kInts || a.kind == Call::Argument::kBools) {
      a.values = in.list();
    } else if (a.kind == Call::Argument::kTensor) {
      a.value = in.bounded(views, "a view");
    } else if (a.kind != Call::Argument::kNone) {
      a.value = in.word();
    }
    call.arguments.push_back(std::move(a));
  }
  call.results = in.list();
  for (const int64_t v : call.results)
    RESNET_FAST_CHECK(v >= -1 && v < views, "tape: a call's result is ", v, ", want -1 to ", views - 1);
  return call;
}

}  // namespace

std::unique_ptr<Tape> read_tape(const char* data, size_t bytes) {
  Reader in(data, bytes);
  auto tape = std::make_unique<Tape>();
  const bool cuda = in.bounded(2, "the kind of device") == 1;
  tape->device_type = cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  tape->device = in.word();
  tape->scratch_bytes = in.bounded(int64_t{1} << 56, "the scratch memory") * 8;
  for (int64_t i = in.count(); i > 0; --i) {
    Buffer b{};
    b.kind = static_cast<Buffer::Kind>(in.bounded(Buffer::kResult + 1, "a buffer's kind"));
    b.location = in.word();
    b.bytes = in.word();
    RESNET_FAST_CHECK(b.bytes >= 0 && (b.kind != Buffer::kScratch ||
                                       (b.location >= 0 && b.location + b.bytes <= tape->scratch_bytes)),
                      "tape: a buffer lies outside of the scratch memory");
    tape->buffers.push_back(b);
  }
  const auto buffers = static_cast<int64_t>(tape->buffers.size());
  for (int64_t i = in.count(); i > 0; --i) {
    View view = read_view(in, buffers);
    tape->inputs.push_back({std::move(view), in.word() != 0});
  }
  const auto inputs = static_cast<int64_t>(tape->inputs.size());
  for (int64_t i = in.count(); i > 0; --i) {
    const int64_t first = in.bounded(inputs, "an input"), second = in.bounded(inputs, "an input");
    tape->aliases.push_back({first, second, in.word()});
  }
  for (int64_t i = in.count(); i > 0; --i) tape->views.push_back(read_view(in, buffers));
  const auto views = static_cast<int64_t>(tape->views.size());
  tape->outputs = in.list();
  for (const int64_t v : tape->outputs)
    RESNET_FAST_CHECK(v >= 0 && v < views, "tape: an output is ", v, ", want 0 to ", views - 1);
  for (const Buffer& b : tape->buffers) {
    const int64_t end = b.kind == Buffer::kInput ? inputs : b.kind == Buffer::kOutput ? views : b.location + 1;
    RESNET_FAST_CHECK(b.kind == Buffer::kConstant || (b.location >= 0 && b.location < end),
                      "tape: a buffer's location is ", b.location);
  }
  for (const View& v : tape->views) {
    const Buffer& b = tape->buffers[static_cast<size_t>(v.buffer)];
    const bool constant = b.kind == Buffer::kConstant;
    tape->constants.push_back(
        constant ? std::optional(from_blob(reinterpret_cast<char*>(b.location), v, tape->device_type, tape->device))
                 : std::nullopt);
  }
  for (int64_t i = in.count(); i > 0; --i) {
    Step step{};
    step.launches = in.bounded(2, "a step's kind") == 0;
    if (step.launches) {
      step.launch = read_launch(in, tape->buffers);
    } else {
      step.call = read_call(in, views);
    }
    step.releases = in.list();
    for (const int64_t b : step.releases)
      RESNET_FAST_CHECK(b >= 0 && b < buffers, "tape: a buffer is ", b, ", want 0 to ", buffers - 1);
    tape->steps.push_back(std::move(step));
  }
  RESNET_FAST_CHECK(in.done(), "tape: there are words behind its end");
  return tape;
}

}  // namespace resnet_fast
