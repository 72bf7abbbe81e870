// The parser: one class, in two files. parse.cpp reads modules, kernels and declarations, statements.cpp
// statements and operands. Device functions are inlined at their calls (parameters become local memory,
// as the ABI has them), so the rest of the simulator knows only straight kernels with branches.
// Recursion and indirect calls are therefore errors.
#pragma once
#include <deque>
#include <unordered_map>

#include "lex.h"
#include "ptx.h"

namespace ptx {

struct Symbol {
  int reg = -1;
  Variable* var = nullptr;
};

struct Function {
  bool entry = false, declared_only = false;
  size_t returns = 0, params = 0, directives = 0, body = 0;  // token indices, 0 where absent
};

class Parser {
 public:
  Parser(const std::string& text, const std::string& wanted) : wanted_(wanted) {
    module_ = std::make_unique<Module>();
    tokens_ = lex(text, &module_->lines);
  }

  std::unique_ptr<Module> run();

 private:
  using Scope = std::unordered_map<std::string, Symbol>;

  [[noreturn]] void fail(const std::string& what, size_t at) const {
    const int line = tokens_[at].line;
    std::string text = line <= (int)module_->lines.size() ? module_->lines[line - 1] : "";
    text.erase(0, text.find_first_not_of(" \t"));
    throw ParseError("PTX line " + std::to_string(line) + ": " + what + ": " + text);
  }
  const Token& peek() const { return tokens_[i_]; }
  bool accept(const char* s) { return peek().is(s) ? (++i_, true) : false; }
  void expect(const char* s) {
    if (!accept(s)) fail(std::string("expected '") + s + "', found '" + peek().text + "'", i_);
  }
  std::string word() {
    if (peek().kind != Token::Word) fail("expected a name", i_);
    return tokens_[i_++].text;
  }
  u64 number() {
    const bool minus = accept("-");
    if (peek().kind != Token::Number) fail("expected a number", i_);
    int width;
    const u64 v = literal(tokens_[i_++], &width);
    return minus ? 0 - v : v;
  }
  void skip_line() {
    for (int line = peek().line; peek().line == line && peek().kind != Token::End;) ++i_;
  }
  void skip_group(const char* open, const char* close);

  // ---- module level ----
  void scan_module();
  void scan_declaration();
  Variable* declare_variable(std::vector<std::unique_ptr<Variable>>& into, bool external = false);
  void initialise(Variable& v, u64 elem, u64& count);

  // ---- kernels ----
  void parse_kernel(const Function& f);

  // One ".param" declaration; `offset` is the space used so far in its segment.
  Variable* param(u32& offset, Space space);

  struct Frame {  // one function instance: its labels are its own
    std::unordered_map<std::string, u64> labels;
    std::unordered_map<std::string, std::vector<std::string>> tables;
    struct Use {
      size_t statement, argument;
      std::vector<u32> blocks;
    };
    std::vector<Use> uses;
    std::vector<u32> blocks;  // braces open inside the body: a label is known in those it stands in
    u32 opened = 0;
    bool inlined = false;
  };
  static std::string label_in(const std::string& name, u32 block) { return name + "{" + std::to_string(block); }
  void body(size_t open);
  void block();

  void place_local(Variable* v) {
    u32& used = kernel_->local_bytes;
    used = (used + v->align - 1) / v->align * v->align;
    v->address = used;
    used += v->size;
  }

  void registers();
  void location();

  // ---- statements ----
  void statement();

  void fail_unless_table(const Statement& s) {
    if (s.args.size() != 2 || s.args[1].kind != Arg::Label) fail("brx needs a target table", i_ - 1);
  }

  // call (ret), name, (args): binds the callee's parameters to the caller's parameter variables.
  void call(Statement& s, size_t first);

  Symbol lookup(const std::string& name, size_t at) const;
  int reg(const std::string& name) const {
    const Symbol s = lookup(name, i_ - 1);
    if (s.reg < 0) fail("'" + name + "' is not a register", i_ - 1);
    return s.reg;
  }

  Arg arg();
  bool in_address() const {  // "name+4" inside brackets belongs to the address
    for (size_t k = i_; k > 0 && !tokens_[k].is(";"); --k)
      if (tokens_[k].is("["))
        return true;
      else if (tokens_[k].is("]"))
        return false;
    return false;
  }

  void resolve_labels();

  std::string wanted_;
  std::unique_ptr<Module> module_;
  std::vector<Token> tokens_;
  size_t i_ = 0;
  std::vector<Scope> scopes_;
  std::unordered_map<std::string, Function> functions_;
  Kernel* kernel_ = nullptr;
  std::deque<Frame> frames_;  // frames must not move while one body is parsed inside another
  Frame* frame_ = nullptr;
  int call_depth_ = 0;
};

}  // namespace ptx
