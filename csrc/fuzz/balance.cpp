// balance against differencing on plain lists, sorted anew whenever one is taken.
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "input.hpp"
#include "packing.hpp"

namespace {

using Costs = std::vector<double>;

struct Part {
    double sum = 0;
    std::vector<std::size_t> items;

    auto key() const { return std::tuple(sum, items.size(), items.empty() ? 0 : items.front()); }
};

using Partition = std::vector<Part>;

bool larger(const Part& a, const Part& b) {
    return a.key() > b.key();
}

bool wider(const Partition& a, const Partition& b) {
    const auto key = [](const Partition& p) {
        return std::tuple_cat(std::tuple(p.front().sum - p.back().sum), p.front().key());
    };
    return key(a) > key(b);
}

Partition difference(const Costs& costs, std::size_t parts, bool equal_size) {
    std::vector<std::size_t> order(costs.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return std::tuple(costs[a], a) > std::tuple(costs[b], b);
    });
    std::vector<Partition> partitions;
    const auto width = equal_size ? parts : 1;
    for (std::size_t i = 0; i < order.size(); ++i) {
        if (i % width == 0) partitions.emplace_back(parts);
        partitions.back()[i % width] = {costs[order[i]], {order[i]}};
    }
    while (partitions.size() > 1) {
        std::sort(partitions.begin(), partitions.end(), wider);
        auto& large = partitions[0];
        for (std::size_t p = 0; p < parts; ++p) {
            const auto& [sum, items] = partitions[1][parts - 1 - p];
            large[p].sum += sum;
            large[p].items.insert(large[p].items.end(), items.begin(), items.end());
        }
        std::sort(large.begin(), large.end(), larger);
        partitions.erase(partitions.begin() + 1);
    }
    return partitions[0];
}

void check_parts(const stepagent::Groups& groups, const Costs& costs, std::size_t parts,
                 bool equal_size, bool exact) {
    REQUIRE(groups.offsets.size() == parts + 1);
    std::vector<int> times(costs.size());
    Costs sums(parts);
    std::vector<std::int64_t> sizes;
    for (std::size_t p = 0; p < parts; ++p) {
        for (auto n = groups.offsets[p]; n < groups.offsets[p + 1]; ++n) {
            const auto item = static_cast<std::size_t>(groups.items[static_cast<std::size_t>(n)]);
            REQUIRE(item < costs.size());
            sums[p] += costs[item];
            ++times[item];
        }
        sizes.push_back(groups.offsets[p + 1] - groups.offsets[p]);
    }
    REQUIRE(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
    const auto [smallest, largest] = std::minmax_element(sizes.begin(), sizes.end());
    REQUIRE(*smallest >= 1 && (!equal_size || *largest - *smallest <= 1));
    if (!exact) return;
    REQUIRE(std::is_sorted(sums.begin(), sums.end(), std::greater<>()));
    // Differencing never lets parts lie further apart than the largest item.
    REQUIRE(sums.front() - sums.back() <= *std::max_element(costs.begin(), costs.end()));
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    const bool exact = kind % 4 != 0, equal_size = kind % 8 > 3;
    const auto parts = kind > 250 ? input.raw(8) : input.size(8);
    Costs costs(input.size(24));
    for (auto& cost : costs) {
        cost = exact ? static_cast<double>(input.integer(0, 12)) / 8
                     : std::bit_cast<double>(input.raw(8) >> (kind % 16 == 0 ? 0 : 1));
    }
    const auto sum = std::accumulate(costs.begin(), costs.end(), 0.0);
    const bool valid =
        1 <= parts && parts <= costs.size() && std::isfinite(sum) &&
        std::all_of(costs.begin(), costs.end(), [](double cost) { return cost >= 0; });
    stepagent::Groups groups;
    try {
        groups = stepagent::balance(costs, parts, equal_size);
        REQUIRE(valid);
    } catch (const std::invalid_argument&) {
        REQUIRE(!valid);
        return 0;
    }
    check_parts(groups, costs, parts, equal_size, exact);
    stepagent::Groups expected;
    for (auto [_, items] : difference(costs, parts, equal_size)) {
        std::sort(items.begin(), items.end());
        expected.items.insert(expected.items.end(), items.begin(), items.end());
        expected.offsets.push_back(static_cast<std::int64_t>(expected.items.size()));
    }
    REQUIRE(groups.items == expected.items && groups.offsets == expected.offsets);
    return 0;
}
