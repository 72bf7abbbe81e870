// Tokens of PTX text.
#pragma once
#include <string>
#include <vector>

#include "types.h"

namespace ptx {

struct Token {
  enum Kind : u8 { Word, Number, String, Mark, End } kind = End;
  std::string text;
  int line = 0;
  bool is(const char* s) const { return kind != String && text == s; }
};

// Words keep their dots ("ld.global.b32", ".reg", "%tid.x"); comments vanish.
std::vector<Token> lex(const std::string& text, std::vector<std::string>* lines);

// Value of an integer or 0f/0d literal; `width` is 0 for integers, else 4 or 8.
u64 literal(const Token& token, int* width);

}  // namespace ptx
