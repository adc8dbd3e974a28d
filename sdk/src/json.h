// A reader for the JSON that vimdeploy writes: model metadata, manifests, the files beside plans.
#ifndef VIMDEPLOY_SDK_JSON_H_
#define VIMDEPLOY_SDK_JSON_H_

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vimdeploy {

// One value. The accessors throw std::invalid_argument, naming what was found, when the value is of another type.
class Json {
 public:
  enum class Type { kNull, kBool, kNumber, kString, kArray, kObject };

  // Throws std::invalid_argument with the position of what is not JSON. Nesting deeper than 64 is refused.
  static Json Parse(std::string_view text);

  Type type() const { return type_; }
  bool is_null() const { return type_ == Type::kNull; }
  bool AsBool() const;
  double AsNumber() const;
  int AsInt() const;  // refuses fractions and what int does not hold
  const std::string& AsString() const;
  const std::vector<Json>& AsArray() const;
  const std::vector<std::pair<std::string, Json>>& AsObject() const;

  // The member called `key`: of At it must exist, of Find it may be missing (nullptr), as may the object itself.
  const Json& At(std::string_view key) const;
  const Json* Find(std::string_view key) const;

 private:
  friend class JsonParser;
  Type type_ = Type::kNull;
  bool bool_ = false;
  double number_ = 0;
  std::string string_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

}  // namespace vimdeploy

#endif  // VIMDEPLOY_SDK_JSON_H_
