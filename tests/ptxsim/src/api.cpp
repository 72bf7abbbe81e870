// The C interface Python loads: compile a kernel, describe it, launch it. Results are JSON.
#include <algorithm>

#include "json.h"
#include "lower.h"

namespace {

thread_local std::string answer;

const char* reply(const Json& j) {
  answer = j.str();
  return answer.c_str();
}

struct Compiled {
  std::unique_ptr<Program> program;
  std::vector<std::vector<u8>> storage;  // module variables; they keep their values between launches
};

const char* kClassNames[] = {"integer",     "float",        "half",          "convert",      "move",
                             "predicate",   "branch",       "load_global",   "store_global", "atomic_global",
                             "load_shared", "store_shared", "atomic_shared", "load_local",   "store_local",
                             "load_param",  "async_copy",   "matrix",        "mma",          "warp",
                             "barrier",     "other"};
static_assert(std::size(kClassNames) == (size_t)Class::kCount);

std::string file_name(const ptx::Module& m, int id) {
  auto it = m.files.find(id);
  if (it == m.files.end()) return "?";
  const size_t slash = it->second.rfind('/');
  return slash == std::string::npos ? it->second : it->second.substr(slash + 1);
}

std::string source_of(const Program& p, u32 pc) {
  const int at = p.kernel->body[pc].location;
  if (at < 0) return "";
  const ptx::Location& l = p.kernel->locations[at];
  if (!l.file) return "";
  std::string s = file_name(*p.module, l.file) + ":" + std::to_string(l.line);
  if (l.at_file) s += " inlined at " + file_name(*p.module, l.at_file) + ":" + std::to_string(l.at_line);
  return s;
}

std::string text_of(const Program& p, u32 pc) {
  const int line = p.kernel->body[pc].line;
  std::string t = line >= 1 && line <= (int)p.module->lines.size() ? p.module->lines[line - 1] : "";
  t.erase(0, t.find_first_not_of(" \t"));
  t.erase(std::min(t.size(), t.find_last_not_of(" \t\r") + 1));
  return t;
}

std::string mma_shape(const ptx::Statement& s) {
  for (const auto& m : s.op)
    if (m.size() > 4 && m[0] == 'm' && m.find('n') != std::string::npos && std::isdigit((unsigned char)m[1])) return m;
  return "?";
}

void add_module_variables(Compiled& c, GlobalMemory& memory) {
  auto& globals = c.program->module->globals;
  const bool first = c.storage.empty();
  if (first) c.storage.resize(globals.size());
  for (size_t k = 0; k < globals.size(); ++k) {
    const ptx::Variable& v = *globals[k];
    if (v.space != Space::Global && v.space != Space::Const) continue;
    auto& data = c.storage[k];
    if (first) {
      data.assign(v.size, 0);
      std::copy(v.init.begin(), v.init.begin() + (long)std::min<size_t>(v.init.size(), v.size), data.begin());
      for (const auto& [at, name] : v.pointers)
        for (const auto& other : globals)
          if (other->name == name) {
            u64 address;
            std::memcpy(&address, &data[at], 8);
            address += other->address;
            std::memcpy(&data[at], &address, 8);
          }
    }
    Buffer b;
    b.name = v.name;
    b.base = v.address;
    b.size = v.size;
    b.host = data.data();
    b.constant = v.space == Space::Const;
    memory.add(std::move(b));
  }
}

void report(Json& j, const Program& p, const Launch& L, GlobalMemory& memory) {
  j.add("executed", L.executed);
  Cost classes[(int)Class::kCount];
  std::map<std::string, u64> flops;
  j.open('[', "rows");
  for (u32 pc = 0; pc < p.code.size(); ++pc) {
    const Cost& c = L.costs[pc];
    Cost& sum = classes[(int)p.code[pc].cls];
    sum.warps += c.warps, sum.lanes += c.lanes, sum.units += c.units, sum.ideal += c.ideal, sum.bytes += c.bytes;
    if (p.code[pc].cls == Class::Mma) flops[mma_shape(p.kernel->body[pc])] += c.warps * p.code[pc].imm;
    if (!c.warps) continue;
    j.open('[')
        .add(nullptr, p.kernel->body[pc].line)
        .add(nullptr, source_of(p, pc))
        .add(nullptr, text_of(p, pc))
        .add(nullptr, kClassNames[(int)p.code[pc].cls]);
    j.add(nullptr, c.warps)
        .add(nullptr, c.lanes)
        .add(nullptr, c.units)
        .add(nullptr, c.ideal)
        .add(nullptr, c.bytes)
        .close(']');
  }
  j.close(']').open('{', "classes");
  for (int k = 0; k < (int)Class::kCount; ++k) {
    const Cost& c = classes[k];
    if (!c.warps) continue;
    j.open('{', kClassNames[k])
        .add("warps", c.warps)
        .add("lanes", c.lanes)
        .add("units", c.units)
        .add("ideal", c.ideal)
        .add("bytes", c.bytes)
        .close('}');
  }
  j.close('}').open('{', "mma_flops");
  for (auto& [shape, n] : flops) j.add(shape.c_str(), n);
  j.close('}').open('[', "buffers");
  const u64 unit = memory.granule();
  for (const Buffer& b : memory.buffers()) {
    u64 read = 0, written = 0;
    const u64 first = b.base / unit;
    for (u64 g = first; b.size && g <= (b.base + b.size - 1) / unit; ++g) {
      const u64 n = std::min((g + 1) * unit, b.base + b.size) - std::max(g * unit, b.base);
      if (b.shadow[g - first].reader) read += n;
      if (b.shadow[g - first].writer & kBlockBits) written += n;
    }
    j.open('{').add("name", b.name).add("bytes", b.size).add("read", read).add("written", written).close('}');
  }
  j.close(']');
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct BufferArgument {
  const char* name;
  u64 base, size;
  void* host;
  u8* init;
  int output;
};

struct LaunchArguments {
  u32 grid[3], block[3];
  u32 dynamic_shared, param_bytes, buffers, pad;
  const u8* params;
  const BufferArgument* buffer;
  u64 seed, limit;
};

void* ptxsim_compile(const char* text, const char* kernel, const char** error) {
  try {
    auto c = std::make_unique<Compiled>();
    c->program = compile(text, kernel);
    return c.release();
  } catch (const ParseError& e) {
    answer = e.what();
    *error = answer.c_str();
    return nullptr;
  }
}

void ptxsim_free(void* handle) { delete (Compiled*)handle; }

const char* ptxsim_describe(void* handle) {
  const Program& p = *((Compiled*)handle)->program;
  Json j;
  j.open('{').open('[', "params");
  for (const auto& q : p.kernel->params) j.open('[').add(nullptr, q.offset).add(nullptr, q.bytes).close(']');
  j.close(']')
      .add("static_shared", p.static_shared)
      .add("dynamic", p.has_dynamic)
      .add("registers", p.register_bytes)
      .add("statements", p.code.size());
  j.add("threads",
        (u64)p.kernel->threads[0] * (u64)std::max(1, p.kernel->threads[1]) * (u64)std::max(1, p.kernel->threads[2]));
  return reply(j.close('}'));
}

const char* ptxsim_launch(void* handle, const LaunchArguments* a) {
  Compiled& c = *(Compiled*)handle;
  const Program& p = *c.program;
  Launch L;
  L.program = c.program.get();
  std::copy(a->grid, a->grid + 3, L.grid);
  std::copy(a->block, a->block + 3, L.block);
  L.dynamic_shared = a->dynamic_shared;
  L.params.assign(a->params, a->params + a->param_bytes);
  L.seed = a->seed;
  L.limit = a->limit;
  for (u32 k = 0; k < a->buffers; ++k) {
    const BufferArgument& b = a->buffer[k];
    Buffer m;
    m.name = b.name, m.base = b.base, m.size = b.size, m.host = (u8*)b.host, m.init = b.init, m.output = b.output != 0;
    L.memory.add(std::move(m));
  }
  add_module_variables(c, L.memory);
  L.memory.prepare(p.global_granule);
  const bool ok = L.run();
  Json j;
  j.open('{');
  if (!ok) {
    j.open('{', "fault").add("kind", L.fault_kind).add("text", L.fault_text).add("address", L.fault_address);
    if (L.fault_pc != kNone)
      j.add("line", p.kernel->body[L.fault_pc].line)
          .add("source", source_of(p, L.fault_pc))
          .add("instruction", text_of(p, L.fault_pc));
    j.open('[', "block");
    for (u32 v : L.fault_block) j.add(nullptr, v);
    j.close(']').open('[', "thread");
    for (u32 v : L.fault_thread) j.add(nullptr, v);
    j.close(']').close('}');
  }
  report(j, p, L, L.memory);
  return reply(j.close('}'));
}

}  // extern "C"
#pragma GCC visibility pop
