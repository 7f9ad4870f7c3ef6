#include "packing.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "tokens.hpp"

namespace stepagent {
namespace {

constexpr std::size_t none = std::numeric_limits<std::size_t>::max();

// Items by falling value; among equal ones the last comes first.
template <typename Value>
std::vector<std::size_t> descending(std::span<const Value> values) {
    std::vector<std::size_t> order(values.size());
    std::iota(order.rbegin(), order.rend(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return values[a] > values[b]; });
    return order;
}

void append(Groups& groups, const std::vector<std::size_t>& items) {
    for (const auto item : items) groups.items.push_back(static_cast<std::int64_t>(item));
    groups.offsets.push_back(static_cast<std::int64_t>(groups.items.size()));
}

// Items that lie in one part: a list through Partitions::next_, and what decides its order.
struct Part {
    double sum;
    std::size_t count, first, last;

    friend bool operator>(const Part& a, const Part& b) {
        if (a.sum != b.sum) return a.sum > b.sum;
        if (a.count != b.count) return a.count > b.count;
        return a.first > b.first;
    }
};

// A partial partition: its parts that hold items, the largest first; the others are empty.
using Partition = std::vector<Part>;

class Partitions {
  public:
    Partitions(std::size_t items, std::size_t parts) : next_(items, none), parts_(parts) {}

    void add(Partition partition) {
        waiting_.push({spread(partition), partition.front(), partitions_.size()});
        partitions_.push_back(std::move(partition));
    }

    // Combines the two of largest spread until one is left.
    Partition difference() {
        while (waiting_.size() > 1) {
            auto large = take();
            add(combine(std::move(large), take()));
        }
        return take();
    }

    std::vector<std::size_t> items(const Part& part) const {
        std::vector<std::size_t> result;
        for (auto item = part.first; item != none; item = next_[item]) result.push_back(item);
        std::sort(result.begin(), result.end());
        return result;
    }

  private:
    struct Waiting {
        double spread;
        Part largest;
        std::size_t partition;

        friend bool operator<(const Waiting& a, const Waiting& b) {
            return a.spread != b.spread ? a.spread < b.spread : b.largest > a.largest;
        }
    };

    double spread(const Partition& partition) const {
        return partition.front().sum - (partition.size() < parts_ ? 0.0 : partition.back().sum);
    }

    Partition take() {
        auto partition = std::move(partitions_[waiting_.top().partition]);
        waiting_.pop();
        return partition;
    }

    // The largest part of one goes with the smallest of the other, and so on.
    Partition combine(Partition a, const Partition& b) {
        const auto clear = parts_ - std::min(parts_, b.size());  // parts of a that meet none of b's
        const auto sorted = std::min(a.size(), clear);
        Partition result(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(sorted));
        for (auto i = sorted; i < a.size(); ++i) result.push_back(join(a[i], b[parts_ - 1 - i]));
        const auto met = a.size() - sorted;
        result.insert(result.end(), b.begin(), b.end() - static_cast<std::ptrdiff_t>(met));
        std::sort(result.begin(), result.end(), std::greater<>());
        return result;
    }

    Part join(const Part& a, const Part& b) {
        next_[a.last] = b.first;
        return {a.sum + b.sum, a.count + b.count, a.first, b.last};
    }

    std::vector<std::size_t> next_;
    const std::size_t parts_;
    std::vector<Partition> partitions_;
    std::priority_queue<Waiting> waiting_;
};

void check_costs(std::span<const double> costs, std::size_t parts) {
    for (std::size_t i = 0; i < costs.size(); ++i) {
        if (!(costs[i] >= 0) || !std::isfinite(costs[i])) {
            throw std::invalid_argument(place("costs", i) +
                                        " must be finite and not negative, got " +
                                        std::to_string(costs[i]));
        }
    }
    // Beyond, two sums would be infinite and their spread no number.
    if (!std::isfinite(std::accumulate(costs.begin(), costs.end(), 0.0))) {
        throw std::invalid_argument("the sum of costs must be finite in float64, got inf");
    }
    if (parts < 1 || costs.size() < parts) {
        throw std::invalid_argument("parts must be at least 1 and at most the number of items, " +
                                    std::to_string(costs.size()) + ", got " +
                                    std::to_string(parts));
    }
}

}  // namespace

Groups pack_bins(std::span<const std::int64_t> lengths, std::int64_t capacity) {
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        if (lengths[i] < 1 || lengths[i] > capacity) {
            throw std::invalid_argument(place("lengths", i) +
                                        " must lie in [1, capacity=" + std::to_string(capacity) +
                                        "], got " + std::to_string(lengths[i]));
        }
    }
    std::vector<std::vector<std::size_t>> bins;
    std::set<std::pair<std::int64_t, std::size_t>> room;  // what is left in a bin, and which
    for (const auto item : descending(lengths)) {
        const auto best = room.lower_bound({lengths[item], 0});
        if (best == room.end()) {
            room.emplace(capacity - lengths[item], bins.size());
            bins.push_back({item});
            continue;
        }
        auto node = room.extract(best);
        bins[node.value().second].push_back(item);
        node.value().first -= lengths[item];
        room.insert(std::move(node));
    }
    Groups groups;
    for (const auto& bin : bins) append(groups, bin);
    return groups;
}

Groups balance(std::span<const double> costs, std::size_t parts, bool equal_size) {
    check_costs(costs, parts);
    const auto order = descending(costs);
    Partitions partitions(costs.size(), parts);
    const auto width = equal_size ? parts : 1;
    for (std::size_t i = 0; i < order.size(); i += width) {
        Partition partition;  // sorted, as its items are
        for (auto j = i; j < std::min(order.size(), i + width); ++j) {
            partition.push_back({costs[order[j]], 1, order[j], order[j]});
        }
        partitions.add(std::move(partition));
    }
    Groups groups;
    for (const auto& last : partitions.difference()) append(groups, partitions.items(last));
    return groups;
}

}  // namespace stepagent
