// From parsed statements to instructions with handlers. Every family of opcodes has its own file,
// which adds its lowerings to the table; a lowering takes the modifiers it knows, and whatever is
// left over is an error.
#pragma once
#include <unordered_map>

#include "machine.h"

class Lower {
 public:
  Lower(Program& program, const ptx::Statement& s) : program(program), s(s), mods_(s.op.begin() + 1, s.op.end()) {}

  Program& program;
  const ptx::Statement& s;
  Inst inst;

  [[noreturn]] void fail(const std::string& what) const;
  bool take(const char* modifier);  // removes it if present
  Ty take_type();  // the next modifier, which must be a type
  Ty maybe_type();
  std::string take_any();  // the next modifier
  const std::string& peek() const;
  bool has(const char* modifier) const;
  void drop(std::initializer_list<const char*> hints);  // cache hints and the like, without meaning here
  void finish();  // fails if modifiers are left

  int count() const { return (int)s.args.size(); }
  const ptx::Arg& arg(int i) const;
  int bytes(const ptx::Arg& a) const;  // of a register; 0 for predicates; -1 for others
  Ref reg(const ptx::Arg& a);  // any register, whatever its width
  Ref use(const ptx::Arg& a, Ty type);  // register, constant or special, width checked
  Ref dest(const ptx::Arg& a, Ty type);
  Ref pred_dest(const ptx::Arg& a);
  Ref pred_use(const ptx::Arg& a, bool* negated);
  Ref constant(u64 value, int bytes);
  u64 immediate(const ptx::Arg& a);
  void operands(std::initializer_list<Ref> refs);
  void operands(const std::vector<Ref>& refs);

  // Registers are placed after all statements are lowered to liveness; this maps them.
  static thread_local const std::vector<u32>* places;

 private:
  std::vector<std::string> mods_;
};

using Lowering = void (*)(Lower&);
using Table = std::unordered_map<std::string, Lowering>;

void add_integer_ops(Table&);
void add_bit_ops(Table&);
void add_float_ops(Table&);
void add_half_ops(Table&);
void add_approx_ops(Table&);
void add_convert_ops(Table&);
void add_move_ops(Table&);
void add_predicate_ops(Table&);
void add_control_ops(Table&);
void add_memory_ops(Table&);
void add_atomic_ops(Table&);
void add_warp_ops(Table&);
void add_async_ops(Table&);
void add_mbarrier_ops(Table&);
void add_matrix_ops(Table&);
void add_mma_ops(Table&);
void add_wmma_ops(Table&);
void add_wgmma_ops(Table&);
// wgmma_order.cpp: finds the instructions that touch registers of wgmmas.
void find_touches(Program& program);

std::unique_ptr<Program> compile(const std::string& text, const std::string& kernel);

// allocate.cpp: places registers so that those never alive together share storage. Per lane, so
// divergence cannot make two live values meet. Returns the byte offset of each register.
std::vector<u32> place_registers(const ptx::Kernel& kernel, u32* total_bytes);
// Which registers a statement writes and reads; true if the write covers the whole register.
void registers_of(const ptx::Statement& s, std::vector<int>& writes, std::vector<int>& reads);

// Handlers over lanes.
template <class D, class A, class F>
Handler unary(F) {
  return [](Warp& w, const Inst& I, u32 m) {
    D* d = w.at<D>(I.r[0]);
    const A* a = w.at<A>(I.r[1]);
    for_lanes(m, [&](int i) { d[i] = F{}(a[i]); });
  };
}
template <class D, class A, class B, class F>
Handler binary(F) {
  return [](Warp& w, const Inst& I, u32 m) {
    D* d = w.at<D>(I.r[0]);
    const A* a = w.at<A>(I.r[1]);
    const B* b = w.at<B>(I.r[2]);
    for_lanes(m, [&](int i) { d[i] = F{}(a[i], b[i]); });
  };
}
template <class D, class A, class B, class C, class F>
Handler ternary(F) {
  return [](Warp& w, const Inst& I, u32 m) {
    D* d = w.at<D>(I.r[0]);
    const A* a = w.at<A>(I.r[1]);
    const B* b = w.at<B>(I.r[2]);
    const C* c = w.at<C>(I.r[3]);
    for_lanes(m, [&](int i) { d[i] = F{}(a[i], b[i], c[i]); });
  };
}

// Calls f with a value of the C++ type of an integer PTX type.
template <class F>
Handler by_integer(const Lower& l, Ty t, F f) {
  switch (t) {
    case Ty::U16: return f(u16{});
    case Ty::S16: return f(s16{});
    case Ty::U32: return f(u32{});
    case Ty::S32: return f(s32{});
    case Ty::U64: return f(u64{});
    case Ty::S64: return f(s64{});
    default: l.fail("integer type expected");
  }
}
template <class F>
Handler by_bits(const Lower& l, Ty t, F f) {
  switch (ptx::bytes_of(t)) {
    case 2: return f(u16{});
    case 4: return f(u32{});
    case 8: return f(u64{});
    default: l.fail("16, 32 or 64-bit type expected");
  }
}
