// Statements and their operands, calls, labels.
#include <algorithm>
#include <iterator>

#include "parser.h"

namespace ptx {

void Parser::statement() {
  Statement s;
  const size_t first = i_;
  s.line = peek().line;
  s.location = (int)kernel_->locations.size() - 1;
  if (accept("@")) {
    s.guard_negated = accept("!");
    s.guard = reg(word());
  }
  std::string op = word();
  for (size_t a = 0, b; a <= op.size(); a = b + 1) {
    b = op.find('.', a);
    if (b == std::string::npos) b = op.size();
    s.op.push_back(op.substr(a, b - a));
  }
  // "mbarrier.try_wait" style "::" qualifiers: the words around the colons are modifiers.
  while (peek().is(":")) {
    expect(":"), expect(":");
    std::string rest = word();
    size_t a = 0, b = rest.find('.');
    s.op.back() += "::" + rest.substr(0, b);
    while (b != std::string::npos) {
      a = b + 1;
      b = rest.find('.', a);
      s.op.push_back(rest.substr(a, b == std::string::npos ? b : b - a));
    }
  }
  if (s.op[0] == "call") return call(s, first);
  while (!accept(";")) {
    s.args.push_back(arg());
    if (accept("|")) s.args.back().reg2 = accept("_") ? -1 : reg(word());
    if (!accept(",") && !peek().is(";")) fail("unreadable operand", i_);
  }
  if (s.op[0] == "ret" && frame_->inlined) {
    s.op[0] = "bra";
    Arg target;
    target.kind = Arg::Label;
    target.name = "<return>";
    s.args = {target};
  }
  for (size_t k = 0; k < s.args.size(); ++k)
    if (s.args[k].kind == Arg::Label) frame_->uses.push_back({kernel_->body.size(), k, frame_->blocks});
  if (s.op[0] == "brx") fail_unless_table(s);
  kernel_->body.push_back(std::move(s));
}

void Parser::call(Statement& s, size_t first) {
  std::vector<std::string> results, arguments;
  auto names = [&](std::vector<std::string>& into) {
    expect("(");
    while (!accept(")")) into.push_back(word()), accept(",");
  };
  if (peek().is("(")) names(results), expect(",");
  const std::string callee = word();
  if (accept(",") && peek().is("(")) names(arguments);
  while (!accept(";")) ++i_;  // a prototype name
  const size_t resume = i_;
  if (callee == "vprintf") fail("printf is not supported", first);
  if (callee == "__assertfail" || callee == "__trap") {
    Statement t;
    t.op = {"assertfail"};
    t.line = s.line, t.location = s.location, t.guard = s.guard, t.guard_negated = s.guard_negated;
    kernel_->body.push_back(t);
    return;
  }
  auto it = functions_.find(callee);
  if (it == functions_.end() || it->second.declared_only) fail("call of unknown function " + callee, first);
  if (++call_depth_ > 32) fail("recursion is not supported", first);
  const Function& f = it->second;
  size_t skip = kNone;
  if (s.guard >= 0) {  // a guarded call: branch around the inlined body
    Statement t;
    t.op = {"bra"};
    t.guard = s.guard, t.guard_negated = !s.guard_negated, t.line = s.line, t.location = s.location;
    t.args.resize(1);
    t.args[0].kind = Arg::Label;
    skip = kernel_->body.size();
    kernel_->body.push_back(t);
  }
  Scope bound;
  auto bind = [&](size_t at, const std::vector<std::string>& actual) {
    size_t n = 0;
    if (at)
      for (size_t k = at + 1; !tokens_[k].is(")"); ++k) {
        const bool ends = tokens_[k + 1].is(",") || tokens_[k + 1].is(")") || tokens_[k + 1].is("[");
        if (tokens_[k].kind == Token::Word && tokens_[k].text[0] != '.' && ends) {
          if (n >= actual.size()) fail("too few arguments for " + callee, first);
          bound[tokens_[k].text] = lookup(actual[n++], first);
        }
      }
  };
  bind(f.returns, results);
  bind(f.params, arguments);
  // The callee sees the module and its own names only.
  std::vector<Scope> saved(std::make_move_iterator(scopes_.begin() + 1), std::make_move_iterator(scopes_.end()));
  scopes_.resize(1);
  scopes_.push_back(std::move(bound));
  scopes_.emplace_back();
  body(f.body);
  scopes_.resize(1);
  for (auto& scope : saved) scopes_.push_back(std::move(scope));
  i_ = resume;
  --call_depth_;
  if (skip != kNone) kernel_->body[skip].args[0].imm = kernel_->body.size();
}

Symbol Parser::lookup(const std::string& name, size_t at) const {
  for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
    auto it = s->find(name);
    if (it != s->end()) return it->second;
  }
  fail("unknown name '" + name + "'", at);
}

Arg Parser::arg() {
  Arg a;
  if (accept("{")) {
    a.kind = Arg::Vec;
    while (!accept("}")) a.elems.push_back(arg()), accept(",");
    return a;
  }
  if (accept("[")) {
    a.kind = Arg::Addr;
    if (peek().kind == Token::Word) a.elems.push_back(arg());
    bool minus = false;
    while (!accept("]")) {
      if (accept("+")) continue;
      if (accept("-")) {
        minus = !minus;
        continue;
      }
      if (peek().kind != Token::Number) fail("unreadable address", i_);
      int width;
      const u64 v = literal(tokens_[i_++], &width);
      a.imm += minus ? 0 - v : v;
      minus = false;
    }
    return a;
  }
  if (accept("!")) {
    a = arg();
    a.negated = true;
    return a;
  }
  const bool minus = accept("-");
  if (peek().kind == Token::Number) {
    int width;
    a.imm = literal(tokens_[i_++], &width);
    a.kind = width ? Arg::Float : Arg::Imm;
    a.wide_float = width == 8;
    if (minus) a.imm = width == 4 ? a.imm ^ 0x80000000u : width == 8 ? a.imm ^ (1ull << 63) : 0 - a.imm;
    return a;
  }
  const std::string name = word();
  if (name == "_") return a;
  a.name = name;
  for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
    auto it = s->find(name);
    if (it == s->end()) continue;
    a.kind = it->second.var ? Arg::Var : Arg::Reg;
    a.reg = it->second.reg;
    a.var = it->second.var;
    if (a.var && peek().is("+") && tokens_[i_ + 1].kind == Token::Number && !in_address()) {
      ++i_;
      a.imm = number();
    }
    return a;
  }
  a.kind = name[0] == '%' || name == "WARP_SZ" ? Arg::Special : Arg::Label;
  return a;
}

void Parser::resolve_labels() {
  for (Frame& f : frames_)
    for (auto& [statement, index, blocks] : f.uses) {
      Statement& s = kernel_->body[statement];
      Arg& a = s.args[index];
      auto table = f.tables.find(a.name);
      auto find = [&](const std::string& name) {
        for (auto b = blocks.rbegin(); b != blocks.rend(); ++b) {
          auto inner = f.labels.find(label_in(name, *b));
          if (inner != f.labels.end()) return inner->second;
        }
        auto it = f.labels.find(name);
        if (it == f.labels.end())
          throw ParseError("PTX line " + std::to_string(s.line) + ": unknown label or name '" + name + "'");
        return it->second;
      };
      if (s.op[0] == "brx" && table != f.tables.end()) {
        for (const auto& name : table->second) s.table.push_back(find(name));
      } else {
        a.imm = find(a.name);
      }
    }
}

}  // namespace ptx
