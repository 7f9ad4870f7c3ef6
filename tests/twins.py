"""Slow, obvious Python twins of what the C++ core computes, for tests."""

from stepagent.tree import TokenTree


def pack_step_pairs(trunks, branches, *, max_tokens=None):
    """`stepagent.tree.pack_step_pairs`, one token at a time; the trees hold lists."""
    trees = []
    for i, (trunk, steps) in enumerate(zip(trunks, branches, strict=True)):
        block = _Block(i, trunk.input_ids.tolist(), trunk.action_spans.tolist(), steps)
        if max_tokens is not None and len(block.nodes) > max_tokens:
            raise ValueError(f"trunks[{i}]")
        full = (
            max_tokens is not None
            and trees
            and (sum(len(b.nodes) for b in trees[-1]) + len(block.nodes) > max_tokens)
        )
        if not trees or full:
            trees.append([])
        trees[-1].append(block)
    return [_tree(blocks) for blocks in trees]


class _Block:
    """A trunk's nodes (token, depth, parent) in pre-order, and its scored actions."""

    def __init__(self, trunk, ids, spans, steps):
        self.nodes, self.actions = [], []
        starts = {start: t for t, (start, _) in enumerate(spans)}
        last = None  # the node of the trunk token before this one
        for position, token in enumerate(ids):
            if position in starts:
                t = starts[position]
                start, end = spans[t]
                paths = {}  # tokens of an action → its nodes
                own = tuple(ids[start:end])
                tried = [tuple(int(token) for token in branch) for branch in steps[t]]
                for action in tried:
                    if action != own and action not in paths:
                        paths[action] = self._chain(action, start, last)
                # The trunk's own tokens come next, one after the other: no branch before the end.
                paths[own] = list(range(len(self.nodes), len(self.nodes) + len(own)))
                for k, action in enumerate([own, *tried]):
                    rows = [last, *paths[action]][: len(action)]
                    self.actions.append((trunk, t, k, action, rows))
            last = self._add(token, position, last)

    def _add(self, token, depth, parent):
        self.nodes.append((token, depth, parent))
        return len(self.nodes) - 1

    def _chain(self, tokens, depth, parent):
        nodes = []
        for token in tokens:
            parent = self._add(token, depth + len(nodes), parent)
            nodes.append(parent)
        return nodes

    def subtree_end(self, node):
        """One after the last node that has `node` among its ancestors, or is it."""
        return 1 + max(n for n in range(len(self.nodes)) if node in self.path(n))

    def path(self, node):
        return [] if node is None else [*self.path(self.nodes[node][2]), node]


def _tree(blocks):
    tree = {name: [] for name in TokenTree.__dataclass_fields__}
    tree["step_offsets"].append(0)
    for block in blocks:
        base = len(tree["input_ids"])
        for node, (token, depth, _) in enumerate(block.nodes):
            tree["input_ids"].append(token)
            tree["position_ids"].append(depth)
            tree["subtree_end"].append(base + block.subtree_end(node))
        for trunk, step, branch, tokens, rows in block.actions:
            tree["labels"] += tokens
            tree["label_rows"] += [base + row for row in rows]
            tree["step_offsets"].append(len(tree["labels"]))
            tree["step_trunk"].append(trunk)
            tree["step_index"].append(step)
            tree["step_branch"].append(branch)
    return TokenTree(**tree)
