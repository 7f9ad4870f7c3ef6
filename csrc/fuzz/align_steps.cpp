// align_steps and step_costs: the alignment costs what it says, and no other costs less.
#include <cmath>
#include <limits>

#include "alignment.hpp"
#include "input.hpp"

namespace {

using stepagent::StepMethod;

struct Problem {
    std::vector<double> costs;
    std::size_t m, n;
    StepMethod method;
    std::int64_t band;

    bool near(std::size_t i, std::size_t j) const {
        return std::abs(static_cast<std::int64_t>(i) - static_cast<std::int64_t>(j)) <= band;
    }
    double pair(std::size_t i, std::size_t j) const {
        const auto cost = costs[i * n + j];
        const bool forbidden = !near(i, j) || (method == StepMethod::lcs && cost > 0);
        return forbidden ? std::numeric_limits<double>::infinity() : cost;
    }
    // The least cost of the steps from (i, j) on, by trying all ways. In dtw, (i, j) is a pair.
    double least(std::size_t i, std::size_t j) const {
        if (method == StepMethod::dtw) {
            if (i == m || j == n) return std::numeric_limits<double>::infinity();
            if (i + 1 == m && j + 1 == n) return pair(i, j);
            return pair(i, j) + std::min({least(i + 1, j + 1), least(i + 1, j), least(i, j + 1)});
        }
        if (i == m || j == n) return static_cast<double>(m - i + n - j);
        return std::min(
            {pair(i, j) + least(i + 1, j + 1), 1 + least(i + 1, j), 1 + least(i, j + 1)});
    }
};

double cost_of(const Problem& problem, const std::vector<std::int32_t>& pairs) {
    double sum = 0;
    std::int32_t i = -1, j = -1;
    for (std::size_t k = 0; k < pairs.size(); k += 2) {
        const auto step_i = pairs[k] - i, step_j = pairs[k + 1] - j;
        if (problem.method == StepMethod::dtw) {
            REQUIRE(step_i >= 0 && step_j >= 0 && step_i <= 1 && step_j <= 1 &&
                    step_i + step_j > 0);
        } else {
            REQUIRE(step_i >= 1 && step_j >= 1);
            sum += step_i + step_j - 2;
        }
        i = pairs[k];
        j = pairs[k + 1];
        REQUIRE(static_cast<std::size_t>(i) < problem.m && static_cast<std::size_t>(j) < problem.n);
        sum += problem.pair(static_cast<std::size_t>(i), static_cast<std::size_t>(j));
    }
    const auto rest = static_cast<double>(problem.m + problem.n) - i - j - 2;
    if (problem.method == StepMethod::dtw) {
        REQUIRE(rest == 0);
        return sum;
    }
    return sum + rest;
}

std::vector<double> built_in_costs(fuzz::Input& input, Problem& problem) {
    fuzz::Rows expert, agent;
    for (std::size_t i = 0; i < problem.m; ++i) expert.add(input.tokens(12));
    for (std::size_t j = 0; j < problem.n; ++j) agent.add(input.tokens(12));
    const auto costs = stepagent::step_costs(expert.view(), agent.view(), problem.band);
    for (std::size_t i = 0; i < problem.m; ++i) {
        for (std::size_t j = 0; j < problem.n; ++j) {
            const auto cost = costs[i * problem.n + j];
            REQUIRE(0 <= cost && cost <= 1);
            if (!problem.near(i, j)) {
                REQUIRE(cost == 0);
            } else {
                const auto a = expert.view()[i], b = agent.view()[j];
                REQUIRE((cost == 0) == std::equal(a.begin(), a.end(), b.begin(), b.end()));
            }
        }
    }
    return costs;
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    Problem problem;
    problem.method = static_cast<StepMethod>(kind % 3);
    problem.m = input.size(kind % 2 == 0 ? 4 : 24);
    problem.n = input.size(kind % 2 == 0 ? 4 : 24);
    if (problem.method == StepMethod::dtw && (problem.m == 0) != (problem.n == 0)) return 0;
    const auto [shorter, longer] = std::minmax(problem.m, problem.n);
    problem.band = input.integer(static_cast<std::int64_t>(longer - shorter),
                                 static_cast<std::int64_t>(longer));
    const bool eighths = kind % 16 < 12;  // their sums are exact
    if (eighths) {
        problem.costs.resize(problem.m * problem.n);
        for (auto& cost : problem.costs) cost = static_cast<double>(input.integer(0, 20)) / 8;
    } else {
        problem.costs = built_in_costs(input, problem);
    }

    const auto align = [&](double cutoff) {
        return stepagent::align_steps(problem.costs, problem.m, problem.n, problem.method,
                                      problem.band, cutoff);
    };
    const auto best = align(std::numeric_limits<double>::infinity());
    const auto tolerance = eighths ? 0 : 1e-9;
    REQUIRE(std::isfinite(best.distance));
    REQUIRE(std::abs(cost_of(problem, best.pairs) - best.distance) <= tolerance);
    if (longer <= 4) {
        const auto least = longer == 0 ? 0 : problem.least(0, 0);
        REQUIRE(std::abs(least - best.distance) <= tolerance);
    }
    const auto cutoff = static_cast<double>(input.integer(0, 60)) / 8;
    const auto within = align(cutoff);
    REQUIRE(best.distance <= cutoff ? within.distance == best.distance && within.pairs == best.pairs
                                    : std::isinf(within.distance) && within.pairs.empty());
    return 0;
}
