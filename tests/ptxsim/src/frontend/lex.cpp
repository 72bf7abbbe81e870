#include "lex.h"

#include <cctype>

namespace ptx {

static bool word_char(char c) { return std::isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }

std::vector<Token> lex(const std::string& text, std::vector<std::string>* lines) {
  size_t start = 0;
  while (start <= text.size()) {
    size_t end = text.find('\n', start);
    if (end == std::string::npos) end = text.size();
    lines->push_back(text.substr(start, end - start));
    start = end + 1;
  }
  std::vector<Token> out;
  int line = 1;
  const size_t n = text.size();
  for (size_t i = 0; i < n;) {
    const char c = text[i];
    if (c == '\n') {
      ++line, ++i;
    } else if (std::isspace((unsigned char)c)) {
      ++i;
    } else if (c == '/' && i + 1 < n && text[i + 1] == '/') {
      while (i < n && text[i] != '\n') ++i;
    } else if (c == '/' && i + 1 < n && text[i + 1] == '*') {
      for (i += 2; i + 1 < n && !(text[i] == '*' && text[i + 1] == '/'); ++i) line += text[i] == '\n';
      i += 2;
    } else if (c == '"') {
      size_t j = i + 1;
      while (j < n && text[j] != '"') j += text[j] == '\\' ? 2 : 1;
      out.push_back({Token::String, text.substr(i + 1, j - i - 1), line});
      i = j + 1;
    } else if (word_char(c)) {
      size_t j = i;
      while (j < n && word_char(text[j])) ++j;
      const bool number = std::isdigit((unsigned char)c);
      out.push_back({number ? Token::Number : Token::Word, text.substr(i, j - i), line});
      i = j;
    } else {
      out.push_back({Token::Mark, std::string(1, c), line});
      ++i;
    }
  }
  out.push_back({Token::End, "<end>", line});
  return out;
}

u64 literal(const Token& token, int* width) {
  const std::string& t = token.text;
  *width = 0;
  try {
    if (t.size() == 10 && t[0] == '0' && (t[1] == 'f' || t[1] == 'F'))
      return *width = 4, std::stoull(t.substr(2), nullptr, 16);
    if (t.size() == 18 && t[0] == '0' && (t[1] == 'd' || t[1] == 'D'))
      return *width = 8, std::stoull(t.substr(2), nullptr, 16);
    size_t used = 0;
    u64 value =
        t.size() > 2 && (t[1] == 'b' || t[1] == 'B') ? std::stoull(t.substr(2), &used, 2) : std::stoull(t, &used, 0);
    if (t.size() > 2 && (t[1] == 'b' || t[1] == 'B')) used += 2;
    if (used < t.size() && (t[used] == 'U' || t[used] == 'u')) ++used;
    if (used == t.size()) return value;
    if (t.find('.') != std::string::npos) return *width = 8, bits_as<u64>(std::stod(t));
  } catch (const std::logic_error&) {
  }
  throw ParseError("line " + std::to_string(token.line) + ": bad number '" + t + "'");
}

}  // namespace ptx
