"""Slow, obvious Python twins of what the C++ core computes, for tests."""

import itertools
import math

import numpy as np

from stepagent.trees.tree import TokenTree


def edit_distance(a, b, *, cutoff=None):
    """`stepagent.edit_distance`: the whole table, cell by cell."""
    table = {}
    for i, j in itertools.product(range(len(a) + 1), range(len(b) + 1)):
        if i == 0 or j == 0:
            table[i, j] = i + j
        else:
            differ = int(a[i - 1] != b[j - 1])
            table[i, j] = min(
                table[i - 1, j - 1] + differ, table[i - 1, j] + 1, table[i, j - 1] + 1
            )
    distance = table[len(a), len(b)]
    return distance if cutoff is None else min(distance, cutoff + 1)


def align_tokens(recorded, retokenized, recorded_ids=None, retokenized_ids=None):
    """`stepagent.align_tokens`: tokens linked wherever they touch the same place, then compared."""
    sides = _places(recorded), _places(retokenized)
    ids = recorded_ids or [0] * len(recorded), retokenized_ids or [0] * len(retokenized)
    prefix = 0
    if recorded_ids is not None:
        while prefix < min(map(len, ids)) and ids[0][prefix] == ids[1][prefix]:
            prefix += 1
    tokens = [(s, i) for s in (0, 1) for i in range(prefix, len(sides[s]))]
    group = {token: token for token in tokens}  # token → the first token of its run
    for one, other in itertools.product(tokens, repeat=2):
        if group[one] != group[other] and _touch(sides[one[0]][one[1]], sides[other[0]][other[1]]):
            old = group[other]
            group = {t: group[one] if g == old else g for t, g in group.items()}
    pairs = [[i, i] for i in range(prefix)]
    for run in set(group.values()):
        a, b = ([i for s, i in tokens if s == side and group[s, i] == run] for side in (0, 1))
        if [(sides[0][i], ids[0][i]) for i in a] == [(sides[1][j], ids[1][j]) for j in b]:
            pairs += [list(pair) for pair in zip(a, b, strict=True)]
    pairs.sort()
    edges = [[-1, -1], *pairs, [len(recorded), len(retokenized)]]
    seams = [[i + 1, k, j + 1, m] for (i, j), (k, m) in itertools.pairwise(edges)]
    return pairs, [seam for seam in seams if seam[0] < seam[1] or seam[2] < seam[3]]


def _places(offsets):
    """Where each token stands: its offsets, or without characters, what its neighbours leave."""
    places = []
    for i, (start, end) in enumerate(offsets):
        lent = start == end
        if lent:
            end = max([0, *(e for s, e in offsets[:i] if s < e)])
            start = min([end, *(s for s, e in offsets[i:] if s < e)])
        places.append((start, end, lent))
    return places


def _touch(a, b):
    if a[0] == a[1] or b[0] == b[1]:
        return a == b
    return a[0] < b[1] and b[0] < a[1]


def token_spans(char_spans, offsets):
    """`stepagent.token_spans`, without its errors: all tokens with a character in the span."""
    spans = []
    for start, end in char_spans:
        inside = [i for i, (s, e) in enumerate(offsets) if s < e and s < end and start < e]
        spans.append([inside[0], inside[-1] + 1] if inside else None)
    return spans


def step_cost(a, b):
    return edit_distance(a, b) / max(len(a), len(b), 1)


def align_steps(costs, method, band=None):
    """`stepagent.align_steps` of a cost matrix: the best of all paths, found by trying them all."""
    m, n = costs.shape
    band = max(m, n) if band is None else band
    distance, moves = min(_paths(costs, method, band, m, n))
    steps, pairs = [m, n], []
    for move in moves:
        if move == 0 or method == "dtw":
            pairs.insert(0, [steps[0] - 1, steps[1] - 1])
        steps[0] -= move != 2
        steps[1] -= move != 1
    return pairs, distance


def _paths(costs, method, band, i, j):
    """Every way back from cell (i, j) as (distance, moves), of moves 0 both, 1 expert, 2 agent."""
    if i == 0 and j == 0:
        return [(0.0, [])]
    dtw = method == "dtw"
    room = band if dtw else max(band, 1)
    if abs(i - j) > room or (dtw and (i == 0 or j == 0)):
        return [(math.inf, [])]
    cost = costs[i - 1, j - 1] if i and j else 0.0
    alone = cost if dtw else 1.0
    both = math.inf if abs(i - j) > band or (method == "lcs" and cost > 0) else cost
    before = [(0, i - 1, j - 1, both), (1, i - 1, j, alone), (2, i, j - 1, alone)]
    return [
        (distance + step, [move, *moves])
        for move, k, m, step in before
        if k >= 0 and m >= 0
        for distance, moves in _paths(costs, method, band, k, m)
    ]


def first_divergence(costs):
    m, n = np.shape(costs)
    for t in range(max(m, n)):
        if t >= min(m, n) or costs[t, t] != 0:
            return t
    return None


def pack_step_pairs(trunks, branches, *, max_tokens=None):
    """`stepagent.trees.tree.pack_step_pairs`, one token at a time; the trees hold lists."""
    trees = []
    for i, (trunk, steps) in enumerate(zip(trunks, branches, strict=True)):
        block = _Block(i, trunk, steps)
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

    def __init__(self, place, trunk, steps):
        self.nodes, self.actions = [], []
        ids, spans = trunk.input_ids.tolist(), trunk.action_spans.tolist()
        starts = {start: t for t, (start, _) in enumerate(spans)}
        rewinds = dict(trunk.rewinds.tolist())
        last = None  # the node of the token before this one
        for position, token in enumerate(ids):
            if position in rewinds:
                last = [None, *self.path(last)][rewinds[position]]
            depth = len(self.path(last))
            if position in starts:
                t = starts[position]
                start, end = spans[t]
                paths = {}  # tokens of an action → its nodes
                own = tuple(ids[start:end])
                tried = [tuple(int(token) for token in branch) for branch in steps[t]]
                for action in tried:
                    if action != own and action not in paths:
                        paths[action] = self._chain(action, depth, last)
                # The trunk's own tokens come next, one after the other: no branch before the end.
                paths[own] = list(range(len(self.nodes), len(self.nodes) + len(own)))
                for k, action in enumerate([own, *tried]):
                    rows = [last, *paths[action]][: len(action)]
                    self.actions.append((place, t, k, action, rows))
            last = self._add(token, depth, last)

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


def _empty_tree():
    tree = {name: [] for name in TokenTree.__dataclass_fields__}
    return tree | {"step_offsets": [0], "extras": {}}


def _tree(blocks):
    tree = _empty_tree()
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


def pack_sequences(sequences, action_masks, *, max_tokens=None, extras=None):
    """`stepagent.trees.tree.pack_sequences`, one token at a time; the trees hold lists."""
    blocks = {}  # first token → the sequences that begin with it
    for i, sequence in enumerate(sequences):
        blocks.setdefault(sequence[0], []).append(i)
    trees = []
    for i, sequence in enumerate(sequences):
        if max_tokens is not None and len(sequence) > max_tokens:
            raise ValueError(f"sequences[{i}]")
    for members in (m for block in blocks.values() for m in _cut(block, sequences, max_tokens)):
        unique = _prefixes(sequences[i] for i in members)
        if not trees or (max_tokens is not None and trees[-1][0] + len(unique) > max_tokens):
            trees.append((0, []))
        trees[-1] = (trees[-1][0] + len(unique), [*trees[-1][1], members])
    extras = extras or {}
    return [_prefix_tree(blocks, sequences, action_masks, extras) for _, blocks in trees]


def _prefixes(sequences):
    return {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}


def _cut(members, sequences, max_tokens):
    """A block in parts that fit, by trying all ways: least repeated, fewest, latest last cut."""
    if max_tokens is None or len(_prefixes(sequences[i] for i in members)) <= max_tokens:
        return [members]

    def place(i):  # in the order of the tree: that of first appearance, token by token
        return [
            next(m for m in members if sequences[m][: n + 1] == sequences[i][: n + 1])
            for n in range(len(sequences[i]))
        ]

    ordered = sorted(members, key=place)

    def size(first, last):
        return len(_prefixes(sequences[i] for i in ordered[first:last]))

    best = {0: (0, 0, ())}  # the first so many: tokens, parts, minus where each begins, last first
    for end in range(1, len(ordered) + 1):
        best[end] = min(
            (tokens + size(start, end), parts + 1, (-start, *starts))
            for start, (tokens, parts, starts) in best.items()
            if size(start, end) <= max_tokens
        )
    starts = sorted(-start for start in best[len(ordered)][2])
    bounds = itertools.pairwise([*starts, len(ordered)])
    return [sorted(ordered[first:last]) for first, last in bounds]


def _prefix_tree(blocks, sequences, action_masks, extras):
    tree = _empty_tree()
    tree["extras"] = {name: [] for name in extras}
    rows = {}  # prefix → its last token's row
    for members in blocks:
        _lay_out([sequences[i] for i in members], (), tree, rows)
    for i in sorted(i for members in blocks for i in members):
        sequence, mask = sequences[i], action_masks[i]
        run = -1
        for p, scored in enumerate(mask):
            if not scored:
                continue
            if not mask[p - 1]:  # a run begins
                run += 1
                tree["step_offsets"].append(tree["step_offsets"][-1])
                tree["step_trunk"].append(i)
                tree["step_index"].append(run)
                tree["step_branch"].append(0)
            tree["labels"].append(sequence[p])
            tree["label_rows"].append(rows[tuple(sequence[:p])])
            tree["step_offsets"][-1] += 1
            for name, values in extras.items():
                tree["extras"][name].append(values[i][p])
    return TokenTree(**tree)


def _lay_out(sequences, prefix, tree, rows):
    """Append what goes on from a prefix, depth first, in the order of first appearance."""
    depth = len(prefix)
    for token in dict.fromkeys(s[depth] for s in sequences if len(s) > depth):
        row = len(tree["input_ids"])
        rows[*prefix, token] = row
        tree["input_ids"].append(token)
        tree["position_ids"].append(depth)
        tree["subtree_end"].append(None)
        longer = [s for s in sequences if len(s) > depth and s[depth] == token]
        _lay_out(longer, (*prefix, token), tree, rows)
        tree["subtree_end"][row] = len(tree["input_ids"])


def visible(subtree_end, window=None):
    """The keys that each query sees: all it descends from and itself, or the last `window`."""
    keys = []
    for q in range(len(subtree_end)):
        path = [k for k in range(q + 1) if q < subtree_end[k]]
        keys.append(path if window is None else path[-window:])
    return keys


def pack_bins(lengths, capacity):
    """`stepagent.trees.packing.pack_bins`, every bin looked at for every item."""
    bins = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -i)):
        room = [capacity - sum(lengths[i] for i in bin) for bin in bins]
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[item]]
        if fitting:
            bins[min(fitting, key=lambda b: room[b])].append(item)
        else:
            bins.append([item])
    return bins


def balance(costs, parts, *, equal_size=False):
    """`stepagent.trees.packing.balance`: lists of items, sorted anew whenever one is taken."""

    def size(items):
        return (sum(costs[i] for i in items), len(items), items[:1])

    def spread(partition):
        return size(partition[0])[0] - size(partition[-1])[0]

    order = sorted(range(len(costs)), key=lambda i: (costs[i], i), reverse=True)
    width = parts if equal_size else 1
    partitions = [
        [[i] for i in order[n : n + width]] + [[]] * (parts - len(order[n : n + width]))
        for n in range(0, len(order), width)
    ]
    while len(partitions) > 1:
        partitions.sort(key=lambda p: (spread(p), size(p[0])), reverse=True)
        first, second, *rest = partitions
        joined = [a + b for a, b in zip(first, reversed(second), strict=True)]
        partitions = [sorted(joined, key=size, reverse=True), *rest]
    return [sorted(items) for items in partitions[0]]
