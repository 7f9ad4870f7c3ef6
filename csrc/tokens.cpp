#include "tokens.hpp"

#include <limits>
#include <stdexcept>
#include <type_traits>

#include "parallel.hpp"

namespace stepagent {
namespace {

constexpr auto largest_id = std::numeric_limits<std::int32_t>::max();

template <typename Id>
bool is_token(Id id) {
    return (static_cast<std::make_unsigned_t<Id>>(id) >> 31) == 0;
}

template <typename Id>
void check(std::span<const Id> ids, const std::function<std::string()>& name) {
    // One pass without branches, so that it vectorizes; the place is looked for only in bad ids.
    std::make_unsigned_t<Id> bits = 0;
    for (const auto id : ids) bits |= static_cast<std::make_unsigned_t<Id>>(id);
    if (is_token(bits)) return;
    std::size_t i = 0;
    while (is_token(ids[i])) ++i;
    throw std::invalid_argument(name() + "[" + std::to_string(i) + "] must lie in [0, " +
                                std::to_string(largest_id) + "], got " + std::to_string(ids[i]));
}

}  // namespace

TokenRows::TokenRows(std::span<const AnyIds> rows,
                     const std::function<std::string(std::size_t)>& name, std::size_t threads)
    : rows_(rows.size()), narrowed_(rows.size()) {
    const auto take = [&](std::size_t row, auto ids) {
        check(ids, [&] { return name(row); });
        if constexpr (std::is_same_v<decltype(ids), Tokens>) {
            rows_[row] = ids;
        } else {
            narrowed_[row] = std::make_unique_for_overwrite<std::int32_t[]>(ids.size());
            for (std::size_t i = 0; i < ids.size(); ++i) {
                narrowed_[row][i] = static_cast<std::int32_t>(ids[i]);
            }
            rows_[row] = {narrowed_[row].get(), ids.size()};
        }
    };
    parallel_for(rows.size(), threads, [&](std::size_t row) {
        std::visit([&](auto ids) { take(row, ids); }, rows[row]);
    });
}

}  // namespace stepagent
