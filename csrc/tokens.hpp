// Token ids as callers hold them, checked once and then seen as int32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace stepagent {

using Tokens = std::span<const std::int32_t>;
using AnyIds = std::variant<Tokens, std::span<const std::int64_t>, std::span<const std::uint64_t>>;

// An entry as messages name it: "trunks[3]".
inline std::string place(const std::string& name, std::size_t i) {
    return name + "[" + std::to_string(i) + "]";
}

// Rows of token ids: int32 ones seen where they lie, wider ones narrowed into memory of its own.
class TokenRows {
  public:
    // Throws std::invalid_argument where an id lies outside [0, 2^31), with the name of its row.
    TokenRows(std::span<const AnyIds> rows, const std::function<std::string(std::size_t)>& name,
              std::size_t threads);

    Tokens operator[](std::size_t i) const { return rows_[i]; }
    std::size_t size() const { return rows_.size(); }

  private:
    std::vector<Tokens> rows_;
    std::vector<std::unique_ptr<std::int32_t[]>> narrowed_;
};

}  // namespace stepagent
