// The same tree with one label a row, for code that predicts one next token per position.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tokens.hpp"

namespace stepagent {

// The arrays of a tree that its layout depends on.
struct TreeView {
    Tokens input_ids, position_ids, subtree_end, labels, label_rows, step_offsets;
};

struct Forked {
    std::vector<std::int32_t> input_ids, position_ids, subtree_end, label_rows;
};

// A token with several children is repeated, one copy before each of them: the tree forks one token
// earlier, and the row of every token but the last of a sequence predicts exactly one. What each
// token sees stays the same. Throws std::invalid_argument where the arrays do not form a tree.
Forked fork_early(const TreeView& tree);

}  // namespace stepagent
