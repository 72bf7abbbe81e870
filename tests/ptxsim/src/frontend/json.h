// Just enough JSON to hand results to Python.
#pragma once
#include <string>

class Json {
 public:
  Json& open(char bracket, const char* key = nullptr) { return item(key), text_ += bracket, fresh_ = true, *this; }
  Json& close(char bracket) { return text_ += bracket, fresh_ = false, *this; }
  Json& add(const char* key, const std::string& v) { return item(key), quote(v), *this; }
  Json& add(const char* key, unsigned long long v) { return item(key), text_ += std::to_string(v), *this; }
  const std::string& str() const { return text_; }

 private:
  void item(const char* key) {
    if (!fresh_) text_ += ',';
    fresh_ = false;
    if (key) quote(key), text_ += ':';
  }
  void quote(const std::string& s) {
    text_ += '"';
    for (unsigned char c : s) {
      if (c == '"' || c == '\\')
        text_ += '\\', text_ += (char)c;
      else
        text_ += c < 32 ? ' ' : (char)c;
    }
    text_ += '"';
  }
  std::string text_;
  bool fresh_ = true;
};
