// A PTX module as parsed: statements with resolved names, before registers get places.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "types.h"

namespace ptx {

struct Location {  // of the source line a statement came from, and where that was inlined
  int file = 0, line = 0, at_file = 0, at_line = 0;
};

struct Variable {
  std::string name;
  Space space = Space::Global;
  u64 size = 0, align = 1, address = 0;
  bool dynamic = false;  // extern shared: takes the launch's dynamic bytes
  std::vector<u8> init;
  std::vector<std::pair<u64, std::string>> pointers;  // initialisers that name another variable
};

struct Arg {
  enum Kind : u8 { Reg, Imm, Float, Vec, Addr, Var, Special, Label, Ignore } kind = Ignore;
  int reg = -1, reg2 = -1;  // reg2: the second destination of "d|p"
  bool negated = false;  // !%p
  u64 imm = 0;  // value, address offset, or statement index of a label
  bool wide_float = false;  // 0d...
  std::string name;
  std::vector<Arg> elems;  // of a vector; of an address: its one base, if it has one
  Variable* var = nullptr;
};

struct Statement {
  std::vector<std::string> op;  // opcode and modifiers
  int guard = -1;
  bool guard_negated = false;
  std::vector<Arg> args;
  int line = 0;
  int location = -1;  // index into Kernel::locations
  std::vector<u64> table;  // branch targets of brx.idx
};

struct Register {
  std::string name;
  int bytes = 4;  // 0 is a predicate
};

struct Param {
  std::string name;
  u32 offset = 0, bytes = 0;
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  u32 param_bytes = 0, local_bytes = 0;
  std::vector<std::unique_ptr<Variable>> variables;  // shared, local and parameter variables
  std::vector<Register> registers;
  std::vector<Statement> body;
  std::vector<Location> locations;
  int threads[3] = {0, 0, 0};  // .reqntid, 0 where absent
};

struct Module {
  std::vector<std::string> lines;
  std::map<int, std::string> files;
  std::vector<std::unique_ptr<Variable>> globals;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  int address_bits = 64;
};

// Parses the module and one kernel of it (all bodies are scanned, only this one is resolved).
std::unique_ptr<Module> parse(const std::string& text, const std::string& kernel);

Ty type_of(const std::string& modifier);  // Ty::None where it is not a type
int bytes_of(Ty type);

}  // namespace ptx
