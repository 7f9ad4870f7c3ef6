// The only file that knows Python: numpy arrays in, numpy arrays out, no algorithm.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "tree.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

// c_style without forcecast, bound with noconvert(): an array of another type or layout is a
// TypeError, never a hidden copy.
using Int32 = py::array_t<std::int32_t, py::array::c_style>;
using Int64 = py::array_t<std::int64_t, py::array::c_style>;

template <typename Array>
auto view(const Array& array) {
    return std::span(array.data(), static_cast<std::size_t>(array.size()));
}

// The array takes the vector's buffer over; the capsule frees it with the array.
Int32 own(std::vector<std::int32_t>&& values) {
    auto owned = std::make_unique<std::vector<std::int32_t>>(std::move(values));
    py::capsule capsule(
        owned.get(), [](void* vector) { delete static_cast<std::vector<std::int32_t>*>(vector); });
    const auto& vector = *owned.release();
    return Int32(static_cast<py::ssize_t>(vector.size()), vector.data(), capsule);
}

py::dict to_dict(stepagent::TokenTree&& tree) {
    return py::dict("input_ids"_a = own(std::move(tree.input_ids)),
                    "position_ids"_a = own(std::move(tree.position_ids)),
                    "subtree_end"_a = own(std::move(tree.subtree_end)),
                    "labels"_a = own(std::move(tree.labels)),
                    "label_rows"_a = own(std::move(tree.label_rows)),
                    "step_offsets"_a = own(std::move(tree.step_offsets)),
                    "step_trunk"_a = own(std::move(tree.step_trunk)),
                    "step_index"_a = own(std::move(tree.step_index)),
                    "step_branch"_a = own(std::move(tree.step_branch)));
}

py::list pack_step_pairs(const Int32& trunk_ids, const Int64& trunk_offsets,
                         const Int64& trunk_steps, const Int32& action_spans,
                         const Int32& branch_ids, const Int64& branch_offsets,
                         const Int64& step_branches, std::int64_t max_tokens) {
    const stepagent::StepPairs pairs{{view(trunk_ids), view(trunk_offsets)},
                                     view(trunk_steps),
                                     view(action_spans),
                                     {view(branch_ids), view(branch_offsets)},
                                     view(step_branches)};
    std::vector<stepagent::TokenTree> trees;
    {
        py::gil_scoped_release release;
        trees = stepagent::pack_step_pairs(pairs, max_tokens);
    }
    py::list result;
    for (auto& tree : trees) result.append(to_dict(std::move(tree)));
    return result;
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.def("pack_step_pairs", &pack_step_pairs, "trunk_ids"_a.noconvert(),
          "trunk_offsets"_a.noconvert(), "trunk_steps"_a.noconvert(), "action_spans"_a.noconvert(),
          "branch_ids"_a.noconvert(), "branch_offsets"_a.noconvert(), "step_branches"_a.noconvert(),
          "max_tokens"_a);
}
