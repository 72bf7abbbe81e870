#include "lower.h"

#include <algorithm>

thread_local const std::vector<u32>* Lower::places = nullptr;

void Lower::fail(const std::string& what) const {
  const auto& lines = program.module->lines;
  std::string text = s.line >= 1 && s.line <= (int)lines.size() ? lines[s.line - 1] : "";
  text.erase(0, text.find_first_not_of(" \t"));
  std::string op = s.op[0];
  for (size_t i = 1; i < s.op.size(); ++i) op += "." + s.op[i];
  throw ParseError("PTX line " + std::to_string(s.line) + ": " + what + ": " + op + "  [" + text + "]");
}

bool Lower::take(const char* m) {
  auto it = std::find(mods_.begin(), mods_.end(), m);
  if (it == mods_.end()) return false;
  mods_.erase(it);
  return true;
}
bool Lower::has(const char* m) const { return std::find(mods_.begin(), mods_.end(), m) != mods_.end(); }
const std::string& Lower::peek() const {
  static const std::string kEmpty;
  return mods_.empty() ? kEmpty : mods_[0];
}
std::string Lower::take_any() {
  if (mods_.empty()) fail("modifier missing");
  std::string m = mods_[0];
  mods_.erase(mods_.begin());
  return m;
}
Ty Lower::maybe_type() {
  const Ty t = mods_.empty() ? Ty::None : ptx::type_of(mods_[0]);
  if (t != Ty::None) mods_.erase(mods_.begin());
  return t;
}
Ty Lower::take_type() {
  const Ty t = maybe_type();
  if (t == Ty::None) fail("type expected" + (mods_.empty() ? std::string() : ", found '." + mods_[0] + "'"));
  return t;
}
void Lower::drop(std::initializer_list<const char*> hints) {
  for (const char* h : hints) take(h);
}
void Lower::finish() {
  if (!mods_.empty()) fail("unknown modifier '." + mods_[0] + "'");
}

const ptx::Arg& Lower::arg(int i) const {
  if (i >= count()) fail("operand missing");
  return s.args[i];
}
int Lower::bytes(const ptx::Arg& a) const {
  return a.kind == ptx::Arg::Reg ? program.kernel->registers[a.reg].bytes : -1;
}
Ref Lower::reg(const ptx::Arg& a) {
  if (a.kind != ptx::Arg::Reg) fail("register expected");
  return (*places)[a.reg] * 2;
}

Ref Lower::constant(u64 value, int bytes) {
  // 32 copies, so that handlers need not tell constants from registers. Small pool: linear search.
  auto& pool = program.constants;
  const size_t stride = (size_t)bytes * kLanes;
  std::vector<u8> lanes(stride);
  for (int i = 0; i < kLanes; ++i) std::memcpy(&lanes[(size_t)i * bytes], &value, bytes);
  for (size_t at = 0; at + stride <= pool.size(); at += 64)
    if (!std::memcmp(&pool[at], lanes.data(), stride)) return (Ref)at * 2 + 1;
  const size_t at = (pool.size() + 63) / 64 * 64;
  pool.resize(at + stride);
  std::memcpy(&pool[at], lanes.data(), stride);
  return (Ref)at * 2 + 1;
}

u64 Lower::immediate(const ptx::Arg& a) {
  if (a.kind != ptx::Arg::Imm) fail("immediate expected");
  return a.imm;
}

static u64 float_constant(const ptx::Arg& a, Ty type, const Lower& l) {
  if (type == Ty::F64 && !a.wide_float) return bits_as<u64>((double)bits_as<float>((u32)a.imm));
  if (a.wide_float && ptx::bytes_of(type) == 4) return bits_as<u32>((float)bits_as<double>(a.imm));
  if (ptx::bytes_of(type) < 4) l.fail("float literal for a 16-bit operand");
  return a.imm;
}

Ref Lower::use(const ptx::Arg& a, Ty type) {
  const int want = ptx::bytes_of(type);
  switch (a.kind) {
    case ptx::Arg::Reg:
      if (type == Ty::Pred ? bytes(a) != 0 : bytes(a) != std::max(want, 2))
        fail("register '" + a.name + "' has the wrong width");
      if (a.negated) fail("negated operand");
      return reg(a);
    case ptx::Arg::Imm:
      if (type == Ty::Pred) return constant(a.imm ? kFullMask : 0, 4);
      if (type == Ty::F32 || type == Ty::F64) fail("integer literal for a float operand");
      return constant(a.imm, std::max(want, 2));
    case ptx::Arg::Float: return constant(float_constant(a, type, *this), want);
    case ptx::Arg::Var: {
      u64 address = a.var->address + a.imm;
      if (a.var->space == Space::Shared) address += kSharedBase;
      return constant(address, want);
    }
    case ptx::Arg::Special: {
      const bool wide = a.name.size() > 2 && a.name.substr(a.name.size() - 2) == "64";
      if (a.name == "WARP_SZ") return constant(32, want);
      const std::string key = a.name + (want == 8 && !wide ? ":64" : want == 2 ? ":16" : "");
      for (auto& sp : program.specials)
        if (sp.name == key) return sp.ref;
      static const char* known[] = {"%tid.x",           "%tid.y",          "%tid.z",           "%ntid.x",
                                    "%ntid.y",          "%ntid.z",         "%ctaid.x",         "%ctaid.y",
                                    "%ctaid.z",         "%nctaid.x",       "%nctaid.y",        "%nctaid.z",
                                    "%laneid",          "%warpid",         "%nwarpid",         "%smid",
                                    "%nsmid",           "%gridid",         "%lanemask_eq",     "%lanemask_lt",
                                    "%lanemask_le",     "%lanemask_gt",    "%lanemask_ge",     "%dynamic_smem_size",
                                    "%total_smem_size", "%clock",          "%clock64",         "%clock_hi",
                                    "%globaltimer",     "%globaltimer_lo", "%cluster_ctaid.x", "%cluster_ctarank",
                                    "%cluster_nctarank"};
      if (std::find(std::begin(known), std::end(known), a.name) == std::end(known))
        fail("unknown special register '" + a.name + "'");
      const u32 at = (program.register_bytes + 63) / 64 * 64;
      program.register_bytes = at + (u32)want * kLanes;
      program.specials.push_back({key, at * 2});
      return at * 2;
    }
    default: fail("unsuitable operand");
  }
}

Ref Lower::dest(const ptx::Arg& a, Ty type) {
  if (a.kind != ptx::Arg::Reg) fail("destination register expected");
  return use(a, type);
}
Ref Lower::pred_dest(const ptx::Arg& a) {
  if (bytes(a) != 0) fail("predicate register expected");
  return reg(a);
}
Ref Lower::pred_use(const ptx::Arg& a, bool* negated) {
  *negated = a.negated;
  if (a.kind == ptx::Arg::Imm) return constant(a.imm ? kFullMask : 0, 4);
  if (bytes(a) != 0) fail("predicate register expected");
  return reg(a);
}
void Lower::operands(const std::vector<Ref>& refs) {
  auto stored = std::make_shared<std::vector<Ref>>(refs);
  program.arena.push_back(stored);
  inst.r = stored->data();
}
void Lower::operands(std::initializer_list<Ref> refs) { operands(std::vector<Ref>(refs)); }

static void place_shared(Program& p) {
  // Variables sit 128 bytes apart at least: banks stay where they would be relative to each
  // variable, and running past the end of one is noticed.
  u32 used = 0;
  ptx::Variable* dynamic = nullptr;
  auto place = [&](ptx::Variable* v) {
    if (v->space != Space::Shared) return;
    if (v->dynamic) {
      dynamic = v;
      return;
    }
    const u32 align = std::max<u32>(128, (u32)v->align);
    used = (used + align - 1) / align * align;
    v->address = used;
    used += (u32)v->size + 128;
  };
  for (auto& v : p.module->globals) place(v.get());
  for (auto& v : p.kernel->variables) place(v.get());
  used = (used + 127) / 128 * 128;
  for (auto& v : p.module->globals)
    if (v->dynamic) v->address = used, p.has_dynamic = true;
  p.static_shared = used;
  (void)dynamic;
}

std::unique_ptr<Program> compile(const std::string& text, const std::string& kernel) {
  static const Table table = [] {
    Table t;
    add_integer_ops(t), add_bit_ops(t), add_float_ops(t), add_half_ops(t), add_approx_ops(t), add_convert_ops(t);
    add_move_ops(t), add_predicate_ops(t), add_control_ops(t), add_memory_ops(t), add_atomic_ops(t), add_warp_ops(t);
    add_async_ops(t), add_mbarrier_ops(t), add_matrix_ops(t), add_mma_ops(t), add_wmma_ops(t);
    add_wgmma_ops(t);
    return t;
  }();
  auto program = std::make_unique<Program>();
  program->module = ptx::parse(text, kernel);
  program->kernel = program->module->kernels.at(kernel).get();
  place_shared(*program);
  u64 global = kGlobalBase >> 1;  // module variables: a range of their own
  for (auto& v : program->module->globals)
    if (v->space == Space::Global || v->space == Space::Const) {
      global = (global + 511) / 256 * 256;
      v->address = global;
      global += v->size;
    }
  const std::vector<u32> places = place_registers(*program->kernel, &program->register_bytes);
  Lower::places = &places;
  for (const ptx::Statement& s : program->kernel->body) {
    Lower l(*program, s);
    auto it = table.find(s.op[0]);
    if (it == table.end()) l.fail("unknown instruction");
    it->second(l);
    l.finish();
    if (s.guard >= 0) {
      l.inst.guard = places[s.guard] * 2;
      l.inst.guard_negated = s.guard_negated;
    }
    program->code.push_back(l.inst);
  }
  Lower::places = nullptr;
  if (program->uses_wgmma) find_touches(*program);
  return program;
}
