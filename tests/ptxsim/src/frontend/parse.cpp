// Modules, kernels, variables, registers.
#include <algorithm>
#include <functional>

#include "parser.h"

namespace ptx {

Ty type_of(const std::string& s) {
  static const std::unordered_map<std::string, Ty> kTypes = {
      {"pred", Ty::Pred},     {"b8", Ty::B8},       {"b16", Ty::B16},    {"b32", Ty::B32}, {"b64", Ty::B64},
      {"b128", Ty::B128},     {"u8", Ty::U8},       {"u16", Ty::U16},    {"u32", Ty::U32}, {"u64", Ty::U64},
      {"s8", Ty::S8},         {"s16", Ty::S16},     {"s32", Ty::S32},    {"s64", Ty::S64}, {"f16", Ty::F16},
      {"bf16", Ty::BF16},     {"tf32", Ty::TF32},   {"f32", Ty::F32},    {"f64", Ty::F64}, {"f16x2", Ty::F16x2},
      {"bf16x2", Ty::BF16x2}, {"u16x2", Ty::U16x2}, {"s16x2", Ty::S16x2}};
  auto it = kTypes.find(s);
  return it == kTypes.end() ? Ty::None : it->second;
}

int bytes_of(Ty t) {
  switch (t) {
    case Ty::None:
    case Ty::Pred: return 0;
    case Ty::B8:
    case Ty::U8:
    case Ty::S8: return 1;
    case Ty::B16:
    case Ty::U16:
    case Ty::S16:
    case Ty::F16:
    case Ty::BF16: return 2;
    case Ty::B64:
    case Ty::U64:
    case Ty::S64:
    case Ty::F64: return 8;
    case Ty::B128: return 16;
    default: return 4;
  }
}

std::unique_ptr<Module> Parser::run() {
  scan_module();
  auto it = functions_.find(wanted_);
  if (it == functions_.end() || !it->second.entry || it->second.declared_only)
    throw ParseError("no kernel '" + wanted_ + "' in this PTX");
  parse_kernel(it->second);
  return std::move(module_);
}

void Parser::skip_group(const char* open, const char* close) {
  expect(open);
  for (int depth = 1; depth; ++i_) {
    if (peek().kind == Token::End) fail("unclosed group", i_);
    depth += peek().is(open) ? 1 : peek().is(close) ? -1 : 0;
  }
}

void Parser::scan_module() {
  scopes_.emplace_back();
  while (peek().kind != Token::End) {
    if (peek().is(".version") || peek().is(".target")) {
      skip_line();
    } else if (accept(".address_size")) {
      module_->address_bits = (int)number();
    } else if (accept(".file")) {
      const int id = (int)number();
      module_->files[id] = tokens_[i_].text;
      skip_line();
    } else if (accept(".section")) {
      ++i_;
      skip_group("{", "}");
    } else {
      scan_declaration();
    }
  }
}

void Parser::scan_declaration() {
  bool external = false;
  for (;;) {
    if (accept(".visible") || accept(".weak") || accept(".common")) continue;
    if (accept(".extern")) {
      external = true;
      continue;
    }
    break;
  }
  if (peek().is(".entry") || peek().is(".func")) {
    Function f;
    f.entry = accept(".entry");
    if (!f.entry) ++i_;
    if (accept(".noreturn")) {
    }
    if (peek().is("(")) f.returns = i_, skip_group("(", ")");
    const std::string name = word();
    if (peek().is("(")) f.params = i_, skip_group("(", ")");
    f.directives = i_;
    while (!peek().is("{") && !peek().is(";")) ++i_;
    if (accept(";"))
      f.declared_only = true;
    else
      f.body = i_, skip_group("{", "}");
    if (!f.declared_only || !functions_.count(name)) functions_[name] = f;
    return;
  }
  if (peek().is(".global") || peek().is(".const") || peek().is(".shared")) {
    declare_variable(module_->globals, external);
    return;
  }
  fail("unknown directive '" + peek().text + "'", i_);
}

Variable* Parser::declare_variable(std::vector<std::unique_ptr<Variable>>& into, bool external) {
  const std::string space = word();
  auto v = std::make_unique<Variable>();
  v->space = space == ".global"   ? Space::Global
             : space == ".const"  ? Space::Const
             : space == ".shared" ? Space::Shared
                                  : Space::Local;
  Ty type = Ty::None;
  u64 vector = 1;
  while (peek().kind == Token::Word && peek().text[0] == '.') {
    const std::string d = word();
    if (d == ".align")
      v->align = number();
    else if (d == ".v2")
      vector = 2;
    else if (d == ".v4")
      vector = 4;
    else if (d == ".ptr" || d == ".attribute")
      fail("unsupported variable attribute", i_);
    else if ((type = type_of(d.substr(1))) == Ty::None)
      fail("unknown type " + d, i_);
  }
  v->name = word();
  u64 count = vector;
  while (accept("[")) {
    if (accept("]")) {
      count = 0;
      continue;
    }
    count *= number();
    expect("]");
  }
  const u64 elem = std::max(1, bytes_of(type));
  v->align = std::max(v->align, elem);
  if (accept("=")) initialise(*v, elem, count);
  v->size = count * elem;
  v->dynamic = external && v->space == Space::Shared && count == 0;
  while (accept(",")) fail("several variables in one declaration", i_);
  expect(";");
  into.push_back(std::move(v));
  Variable* var = into.back().get();
  scopes_.back()[var->name] = {-1, var};
  return var;
}

void Parser::initialise(Variable& v, u64 elem, u64& count) {
  u64 at = 0;
  auto one = [&] {
    int width = 0;
    u64 value = 0;
    if (peek().kind == Token::Word) {  // an address: generic(name), name, name+offset
      std::string name = word();
      if (name == "generic") expect("("), name = word(), expect(")");
      v.pointers.push_back({at, name});
      if (accept("+")) value = number();
    } else {
      const bool minus = accept("-");
      value = literal(tokens_[i_++], &width);
      if (minus) value = 0 - value;
    }
    v.init.resize(at + elem);
    std::memcpy(v.init.data() + at, &value, elem);
    at += elem;
  };
  std::function<void()> list = [&] {
    if (!accept("{")) return one();
    if (accept("}")) return;
    do list();
    while (accept(","));
    expect("}");
  };
  list();
  count = std::max(count, at / elem);
}

void Parser::parse_kernel(const Function& f) {
  auto owned = std::make_unique<Kernel>();
  kernel_ = owned.get();
  kernel_->name = wanted_;
  module_->kernels[wanted_] = std::move(owned);
  scopes_.emplace_back();
  if (f.params) {
    i_ = f.params;
    expect("(");
    while (!accept(")")) {
      param(kernel_->param_bytes, Space::Param);
      accept(",");
    }
  }
  for (i_ = f.directives; !peek().is("{");) {
    if (accept(".reqntid")) {
      for (int d = 0; d < 3; ++d) {
        kernel_->threads[d] = d == 0 || accept(",") ? (int)number() : 1;
      }
    } else {
      ++i_;
    }
  }
  call_depth_ = 0;
  body(f.body);
  resolve_labels();
}

Variable* Parser::param(u32& offset, Space space) {
  if (!accept(".param")) fail("expected .param", i_);
  auto v = std::make_unique<Variable>();
  v->space = space;
  Ty type = Ty::None;
  while (peek().kind == Token::Word && peek().text[0] == '.') {
    const std::string d = word();
    if (d == ".align") {
      const u64 a = number();
      if (type == Ty::None) v->align = a;
    } else if (d == ".ptr" || d == ".global" || d == ".shared" || d == ".const" || d == ".local") {
    } else if ((type = type_of(d.substr(1))) == Ty::None)
      fail("unknown type " + d, i_);
    else
      v->align = std::max<u64>(v->align, bytes_of(type));
  }
  v->name = word();
  u64 count = 1;
  if (accept("[")) count = number(), expect("]");
  v->size = count * bytes_of(type);
  v->align = std::max<u64>(v->align, bytes_of(type));
  offset = (offset + v->align - 1) / v->align * v->align;
  v->address = offset;
  offset += v->size;
  if (space == Space::Param) kernel_->params.push_back({v->name, (u32)v->address, (u32)v->size});
  kernel_->variables.push_back(std::move(v));
  Variable* var = kernel_->variables.back().get();
  scopes_.back()[var->name] = {-1, var};
  return var;
}

void Parser::body(size_t open) {
  frames_.emplace_back();
  Frame* outer = frame_;
  frames_.back().inlined = call_depth_ > 0;
  frame_ = &frames_.back();
  i_ = open;
  expect("{");
  block();
  frame_->labels["<return>"] = kernel_->body.size();
  if (!frame_->inlined) {  // falling off the end is an exit
    Statement s;
    s.op = {"exit"};
    s.line = tokens_[i_ - 1].line;
    s.location = (int)kernel_->locations.size() - 1;
    kernel_->body.push_back(s);
  }
  frame_ = outer;
}

void Parser::block() {
  while (!accept("}")) {
    const Token& t = peek();
    if (t.kind == Token::End) fail("unclosed body", i_);
    if (accept(";")) continue;
    if (accept("{")) {
      scopes_.emplace_back();
      frame_->blocks.push_back(++frame_->opened);
      block();
      frame_->blocks.pop_back();
      scopes_.pop_back();
    } else if (t.is(".reg") || t.text.rfind(".reg.", 0) == 0) {
      registers();
    } else if (t.is(".local") || t.is(".shared")) {
      Variable* v = declare_variable(kernel_->variables);
      if (v->space == Space::Local) place_local(v);
    } else if (t.is(".param")) {
      param(kernel_->local_bytes, Space::Local);
      expect(";");
    } else if (t.is(".loc")) {
      location();
    } else if (t.is(".pragma")) {
      skip_line();
    } else if (t.is(".file")) {
      skip_line();
    } else if (t.kind == Token::Word && tokens_[i_ + 1].is(":") && !tokens_[i_ + 2].is(":")) {
      const std::string label = word();
      frame_->labels[frame_->blocks.empty() ? label : label_in(label, frame_->blocks.back())] = kernel_->body.size();
      ++i_;
      if (peek().is(".branchtargets")) {
        const std::string name = tokens_[i_ - 2].text;
        ++i_;
        do frame_->tables[name].push_back(word());
        while (accept(","));
        expect(";");
      } else if (peek().is(".callprototype")) {
        fail("indirect calls are not supported", i_);
      }
    } else {
      statement();
    }
  }
}

void Parser::registers() {
  const std::string directive = word();  // ".reg .b32" or, in inline assembly, ".reg.b32"
  const Ty type = type_of(directive.size() > 4 ? directive.substr(5) : word().substr(1));
  if (type == Ty::None || type == Ty::B128) fail("unsupported register type", i_ - 1);
  const int bytes = type == Ty::Pred ? 0 : std::max(2, bytes_of(type));
  auto add = [&](const std::string& name) {
    scopes_.back()[name] = {(int)kernel_->registers.size(), nullptr};
    kernel_->registers.push_back({name, bytes});
  };
  do {
    const std::string name = word();
    if (accept("<")) {
      const u64 n = number();
      expect(">");
      for (u64 k = 0; k < n; ++k) add(name + std::to_string(k));
    } else {
      add(name);
    }
  } while (accept(","));
  expect(";");
}

void Parser::location() {
  const int line = peek().line;
  ++i_;
  Location loc;
  loc.file = (int)number();
  loc.line = (int)number();
  while (peek().line == line && peek().kind != Token::End) {
    if (accept("inlined_at"))
      loc.at_file = (int)number(), loc.at_line = (int)number();
    else
      ++i_;
  }
  kernel_->locations.push_back(loc);
}

std::unique_ptr<Module> parse(const std::string& text, const std::string& kernel) { return Parser(text, kernel).run(); }

}  // namespace ptx
