#include "json.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace vimdeploy {
namespace {

constexpr int kMaxDepth = 64;

const char* Name(Json::Type type) {
  switch (type) {
    case Json::Type::kNull:
      return "null";
    case Json::Type::kBool:
      return "a truth value";
    case Json::Type::kNumber:
      return "a number";
    case Json::Type::kString:
      return "a string";
    case Json::Type::kArray:
      return "an array";
    case Json::Type::kObject:
      return "an object";
  }
  return "?";
}

void Expect(Json::Type wanted, Json::Type found) {
  if (wanted != found)
    throw std::invalid_argument(std::string(Name(found)) + " where " + Name(wanted) + " is expected");
}

void AppendUtf8(unsigned code, std::string* out) {
  const auto put = [out](unsigned byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

// Recursive descent over RFC 8259.
class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json Document() {
    Json value = Value(0);
    SkipSpace();
    if (at_ != text_.size()) Fail("more text after the value");
    return value;
  }

 private:
  [[noreturn]] void Fail(const std::string& what) const {
    throw std::invalid_argument("not JSON at byte " + std::to_string(at_) + ": " + what);
  }

  // '\0' at the end, which no rule accepts.
  char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void SkipSpace() {
    while (Peek() == ' ' || Peek() == '\t' || Peek() == '\n' || Peek() == '\r') ++at_;
  }

  bool Take(char c) {
    if (Peek() != c) return false;
    ++at_;
    return true;
  }

  bool TakeWord(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json Value(int depth) {
    if (depth > kMaxDepth) Fail("nested too deeply");
    SkipSpace();
    Json value;
    if (Take('{')) {
      Object(depth, &value);
    } else if (Take('[')) {
      Array(depth, &value);
    } else if (Peek() == '"') {
      value.type_ = Json::Type::kString;
      value.string_ = String();
    } else if (Peek() == '-' || IsDigit(Peek())) {
      value.type_ = Json::Type::kNumber;
      value.number_ = Number();
    } else if (TakeWord("true")) {
      value.type_ = Json::Type::kBool;
      value.bool_ = true;
    } else if (TakeWord("false")) {
      value.type_ = Json::Type::kBool;
    } else if (!TakeWord("null")) {
      Fail("a value is expected");
    }
    return value;
  }

  void Object(int depth, Json* value) {
    value->type_ = Json::Type::kObject;
    SkipSpace();
    if (Take('}')) return;
    do {
      SkipSpace();
      if (Peek() != '"') Fail("a name in quotes is expected");
      std::string name = String();
      SkipSpace();
      if (!Take(':')) Fail("':' is expected");
      value->members_.emplace_back(std::move(name), Value(depth + 1));
      SkipSpace();
    } while (Take(','));
    if (!Take('}')) Fail("',' or '}' is expected");
  }

  void Array(int depth, Json* value) {
    value->type_ = Json::Type::kArray;
    SkipSpace();
    if (Take(']')) return;
    do {
      value->items_.push_back(Value(depth + 1));
      SkipSpace();
    } while (Take(','));
    if (!Take(']')) Fail("',' or ']' is expected");
  }

  void Digits() {
    if (!IsDigit(Peek())) Fail("a digit is expected");
    while (IsDigit(Peek())) ++at_;
  }

  double Number() {
    const std::size_t start = at_;
    Take('-');
    if (!Take('0')) Digits();
    if (Take('.')) Digits();
    if (Take('e') || Take('E')) {
      if (!Take('+')) Take('-');
      Digits();
    }
    // Not strtod, which reads "0,5" where the program's locale writes it so.
    std::istringstream stream{std::string(text_.substr(start, at_ - start))};
    stream.imbue(std::locale::classic());
    double number = 0;
    if (!(stream >> number)) Fail("a number that a double does not hold");
    return number;
  }

  unsigned Hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = Peek();
      unsigned digit = 0;
      if (IsDigit(c)) {
        digit = static_cast<unsigned>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        digit = static_cast<unsigned>(c - 'a') + 10;
      } else if (c >= 'A' && c <= 'F') {
        digit = static_cast<unsigned>(c - 'A') + 10;
      } else {
        Fail("four hex digits are expected");
      }
      code = code << 4 | digit;
      ++at_;
    }
    return code;
  }

  void Escape(std::string* out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt";
    static constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
    if (const std::size_t i = kNames.find(Peek()); Peek() != '\0' && i != kNames.npos) {
      out->push_back(kValues[i]);
      ++at_;
      return;
    }
    if (!Take('u')) Fail("an unknown escape");
    unsigned code = Hex4();
    if (code >= 0xD800 && code < 0xE000) {  // characters beyond 16 bits come as two halves
      if (code >= 0xDC00 || !TakeWord("\\u")) Fail("half a surrogate pair");
      const unsigned low = Hex4();
      if (low < 0xDC00 || low >= 0xE000) Fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    AppendUtf8(code, out);
  }

  std::string String() {
    std::string out;
    Take('"');
    while (!Take('"')) {
      if (at_ >= text_.size()) Fail("the text ends inside a string");
      if (static_cast<unsigned char>(Peek()) < 0x20) Fail("a control character in a string");
      if (Take('\\')) {
        Escape(&out);
      } else {
        out.push_back(text_[at_++]);
      }
    }
    return out;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Json Json::Parse(std::string_view text) { return JsonParser(text).Document(); }

bool Json::AsBool() const {
  Expect(Type::kBool, type_);
  return bool_;
}

double Json::AsNumber() const {
  Expect(Type::kNumber, type_);
  return number_;
}

int Json::AsInt() const {
  const double number = AsNumber();
  if (number != std::floor(number) || std::abs(number) > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::to_string(number) + " where a whole number is expected");
  return static_cast<int>(number);
}

const std::string& Json::AsString() const {
  Expect(Type::kString, type_);
  return string_;
}

const std::vector<Json>& Json::AsArray() const {
  Expect(Type::kArray, type_);
  return items_;
}

const std::vector<std::pair<std::string, Json>>& Json::AsObject() const {
  Expect(Type::kObject, type_);
  return members_;
}

const Json& Json::At(std::string_view key) const {
  Expect(Type::kObject, type_);
  const Json* const found = Find(key);
  if (found == nullptr) throw std::invalid_argument("no \"" + std::string(key) + "\"");
  return *found;
}

const Json* Json::Find(std::string_view key) const {
  // The last one counts, as in Python.
  for (auto member = members_.rbegin(); member != members_.rend(); ++member)
    if (member->first == key) return &member->second;
  return nullptr;
}

}  // namespace vimdeploy
