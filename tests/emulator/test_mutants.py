"""Kernels with one fault put in: the emulator must see each of them.

A mutant is a snippet of a kernel source, replaced. Its check (checks.py) must hold for the kernels
as they are, and fail for the mutant.
"""

import multiprocessing
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from emulator import checks
from emulator.build import CSRC, build_library, product_sources
from helpers import emulator_tools

pytestmark = pytest.mark.emulator
UNOPTIMIZED = ["-O0"]  # compiling takes most of the time
PROCESSES = multiprocessing.get_context("forkserver")  # one that has imported torch
PROCESSES.set_forkserver_preload(["emulator.checks"])


@dataclass(frozen=True)
class Mutant:
    """A fault in one file.

    Attributes:
        name: What is wrong.
        check: Of `checks.CHECKS`, which must fail.
        file: In csrc.
        snippet: Occurs once in the file.
        replacement: What takes its place.
    """

    name: str
    check: str
    file: str
    snippet: str
    replacement: str = ""

    def apply(self, csrc: Path) -> None:
        path = csrc / self.file
        text = path.read_text()
        found = text.count(self.snippet)
        assert found == 1, f"{self.file} has this snippet {found} times, not once:\n{self.snippet}"
        path.write_text(text.replace(self.snippet, self.replacement))


MUTANTS = [
    Mutant(
        "block_reduce: no barrier before the sums of the warps are read",
        "sample",
        "common/reduce.cuh",
        "  if (lane == 0) scratch[warp] = v;\n  __syncthreads();\n",
        "  if (lane == 0) scratch[warp] = v;\n",
    ),
    Mutant(
        "block_reduce: no barrier after the sums of the warps are read",
        "sample",
        "common/reduce.cuh",
        "  __syncthreads();  // a second call may overwrite scratch\n",
    ),
    Mutant(
        "norm: no barrier before the sums of the warps are read",
        "norm",
        "norm/row.cuh",
        "    __syncthreads();\n    float sum = 0.f;\n",
        "    float sum = 0.f;\n",
    ),
    Mutant(
        "norm: no barrier before the moments of the warps are read",
        "norm",
        "norm/row.cuh",
        "    __syncthreads();\n    Moments all{",
        "    Moments all{",
    ),
    Mutant(
        "norm: counts elements past the end of a row",
        "norm",
        "norm/row.cuh",
        "min(max(hidden_size - first, 0), kLanes * Vec<T>::kSize)",
        "kLanes * Vec<T>::kSize",
    ),
    Mutant(
        "norm: squares about the warps' means are taken for those about the row's",
        "norm",
        "norm/row.cuh",
        " + smem.moments[i].count * shift * shift",
    ),
    Mutant(
        "norm: sums past the end of a row",
        "norm",
        "norm/row.cuh",
        "inside(i) ? part : 0.f",
        "part",
    ),
    Mutant(
        "norm: writes past the end of a row",
        "norm",
        "norm/row.cuh",
        "if (inside(i)) store_vec(out + offset(i), from_floats(y));",
        "store_vec(out + offset(i), from_floats(y));",
    ),
    Mutant(
        "linear: no barrier before the sums of squares are read",
        "linear",
        "gemv/linear.cuh",
        "squares[token + 8 * half][warp] = sum;\n  }\n  __syncthreads();\n",
        "squares[token + 8 * half][warp] = sum;\n  }\n",
    ),
    Mutant(
        "linear: reads activations past the end of a row",
        "linear",
        "gemv/rows.cuh",
        "column(step) < end_;",
        "column(step) < end_ + 8;",
    ),
    Mutant(
        "linear: no barrier before the sums of the warps are read",
        "linear",
        "gemv/product.cuh",
        "      __syncthreads();\n      if (valid) {",
        "      if (valid) {",
    ),
    Mutant(
        "linear: no barrier before the sums of the warps are overwritten",
        "linear",
        "gemv/product.cuh",
        "      __syncthreads();\n    }\n    finish",
        "    }\n    finish",
    ),
    Mutant(
        "linear: writes past the last output",
        "linear",
        "gemv/product.cuh",
        "slot.token < num_tokens && n < out_features;",
        "slot.token < num_tokens;",
    ),
    Mutant(
        "linear: copies weights past the end of a row",
        "linear",
        "gemv/weight_stream.cuh",
        "inside = lane_column() < left_ && ",
        "inside = ",
    ),
    Mutant(
        "linear: takes weights before they have arrived",
        "linear",
        "gemv/weight_stream.cuh",
        "ptx::cp_async_wait<kStages - 1>();",
        "ptx::cp_async_wait<kStages>();",
    ),
    Mutant(
        "linear: takes weights that other lanes are waiting for",
        "linear",
        "gemv/weight_stream.cuh",
        "    __syncwarp();\n#pragma unroll\n    for (int i = 0; i < kChunkSteps; ++i) weights",
        "#pragma unroll\n    for (int i = 0; i < kChunkSteps; ++i) weights",
    ),
    Mutant(
        "fused_mlp: hidden is taken before it is written",
        "fused_mlp",
        "gemv/rows.cuh",
        "while (__any_sync(0xffffffffu, max == kUnwritten));",
        "while (false);",
    ),
    Mutant(
        "fused_mlp: the sums of the parts are taken before they are written",
        "fused_mlp",
        "mlp/fused_mlp.cuh",
        "while (max == kUnwritten);",
        "while (false);",
    ),
    Mutant(
        "fused_mlp: a place is not cleared for the next launch",
        "fused_mlp",
        "mlp/fused_mlp.cuh",
        "      other[i] = make_uint4(kUnwritten, kUnwritten, kUnwritten, kUnwritten);\n",
    ),
    Mutant(
        "fused_mlp: launches take the same place",
        "fused_mlp",
        "mlp/fused_mlp.cuh",
        "    turns.count -= 1;\n",
    ),
    Mutant(
        "linear: the second half of the operand has the rows of the first",
        "linear",
        "gemv/rows.cuh",
        "load(row + 8 * half * rows.stride",
        "load(row",
    ),
    Mutant(
        "gemm: no barrier before the next stage is read",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "          __syncthreads();  // the next stage has arrived for all; "
        "and all are done with this one\n",
    ),
    Mutant(
        "gemm: no wait for the next stage",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "        if (last) {\n          ptx::cp_async_wait<kStages - 2>();\n",
        "        if (last) {\n",
    ),
    Mutant(
        "gemm: reads columns past the last one",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "const bool valid = column() < left;",
        "const bool valid = true;",
    ),
    Mutant(
        "gemm: starts a tile with the sums of the tile before",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "    tile.clear();\n    for",
        "    if (at == blockIdx.x) tile.clear();\n    for",
    ),
    Mutant(
        "gemm: forgets all but the last sums of float16",
        "tiled_mlp",
        "gemm/tile.cuh",
        "sums[m][n][e + 1] += pair.y;",
        "sums[m][n][e + 1] = pair.y;",
    ),
    Mutant(
        "gemm: fragments of the wrong half of a stage",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "Tile::load_a(next, from, (step + 1) % Tile::kSteps, m);",
        "Tile::load_a(next, from, step, m);",
    ),
    Mutant(
        "gemm: refills the stage that is read",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "      refill = stage;\n",
        "      refill = next_stage;\n",
    ),
    Mutant(
        "gemm: writes past the last row",
        "tiled_mlp",
        "gemm/tile.cuh",
        "      if (row >= num_rows) continue;\n",
    ),
    Mutant(
        "gemm: writes past the last column",
        "tiled_mlp",
        "gemm/tile.cuh",
        "        if (first_column + j * 32 < num_columns) epilogue.store(",
        "        epilogue.store(",
    ),
    Mutant(
        "gemm: columns of a thread are no neighbours",
        "tiled_mlp",
        "gemm/gemm.cuh",
        "Config::kTileColumns, true>",
        "Config::kTileColumns, false>",
    ),
    Mutant(
        "tiled_mlp: drops the residual",
        "tiled_mlp",
        "mlp/tiled_mlp.cuh",
        "from_float<T>(sums[i] + to_float(added[i]))",
        "from_float<T>(sums[i])",
    ),
    Mutant(
        "attention: no wait for the tile of keys",
        "attention",
        "attention/attention.cuh",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();  // the next tile",
        "    __syncthreads();  // the next tile",
    ),
    Mutant(
        "attention: no wait for the queries",
        "attention",
        "attention/attention.cuh",
        "work.first_row);\n  ptx::cp_async_wait<0>();\n",
        "work.first_row);\n",
    ),
    Mutant(
        "attention: no barrier between tiles",
        "attention",
        "attention/attention.cuh",
        "    __syncthreads();  // the next tile has arrived for all; ",
        "    // ",
    ),
    Mutant(
        "attention: no barrier before the results of the warps are merged",
        "attention",
        "attention/attention.cuh",
        "    __syncthreads();\n    for (int row = warp;",
        "    for (int row = warp;",
    ),
    Mutant(
        "attention: no barrier before the splits are merged",
        "attention",
        "attention/attention.cuh",
        "  result.write(smem, warp, 0);\n  __syncthreads();\n",
        "  result.write(smem, warp, 0);\n",
    ),
    Mutant(
        "attention: rows are stored before the lanes have written them",
        "attention",
        "attention/attention.cuh",
        "  __syncwarp();\n\n  // Whole rows",
        "  // Whole rows",
    ),
    Mutant(
        "attention: attends to keys after the query's own",
        "attention",
        "attention/visibility.cuh",
        "if (at < rows.keys[e / 2].begin || at >= rows.keys[e / 2].end)",
        "if (at < rows.keys[e / 2].begin)",
    ),
    Mutant(
        "attention: attends to keys after the query's own where scores have a cap",
        "attention",
        "attention/visibility.cuh",
        "if (at < keys.begin || at >= keys.end) {",
        "if (at < keys.begin) {",
    ),
    Mutant(
        "attention: reads keys past the length",
        "attention",
        "attention/tile.cuh",
        "const bool valid = key + i * kStep < num_keys;",
        "const bool valid = true;",
    ),
    Mutant(
        "attention: takes a tile with keys after the query's own for visible",
        "attention",
        "attention/attention.cuh",
        "first_keys.end / kKeys};  // to all rows",
        "(first_keys.end + kKeys - 1) / kKeys};  // to all rows",
    ),
    Mutant(
        "attention: reads past the end of the mask",
        "attention",
        "attention/visibility.cuh",
        "if (key + kSpan <= p.max_keys) {",
        "if (true) {",
    ),
    Mutant(
        "attention: takes the mask of other keys",
        "attention",
        "attention/visibility.cuh",
        "const int at = n * 2 + e % 2;\n        if ((words",
        "const int at = n * 2 + 1 - e % 2;\n        if ((words",
    ),
    Mutant(
        "attention: reads an additive mask past its keys",
        "attention",
        "attention/visibility.cuh",
        "const bool is_whole = key + kSpan <= p.max_keys;",
        "const bool is_whole = true;",
    ),
    Mutant(
        "attention: adds the mask of other keys",
        "attention",
        "attention/visibility.cuh",
        "scores[at / 2][half * 2 + at % 2]",
        "scores[at / 2][half * 2 + 1 - at % 2]",
    ),
    Mutant(
        "attention: adds the mask of another token",
        "attention",
        "attention/attention.cuh",
        "smem.rows.token[row + 16 * r + 8 * half], key);",
        "smem.rows.token[row + 16 * r], key);",
    ),
    Mutant(
        "attention: the origin of the exponent stays behind",
        "attention",
        "attention/softmax.cuh",
        "kMargin = 8.f;",
        "kMargin = 80.f;",
    ),
    Mutant(
        "attention: only the last row moves the origins",
        "attention",
        "attention/softmax.cuh",
        "grows |= fmaf",
        "grows = fmaf",
    ),
    Mutant(
        "attention: the sum is not rescaled",
        "attention",
        "attention/softmax.cuh",
        "      origin[i] = next;\n      sum[i] *= rescale;\n",
        "      origin[i] = next;\n",
    ),
    Mutant(
        "attention: one column of a pair is not rescaled",
        "attention",
        "attention/softmax.cuh",
        "        out[i / 2][n][i % 2 * 2 + 1] *= rescale;\n",
    ),
    Mutant(
        "attention_rope: queries are turned before those of other threads have arrived",
        "attention_rope",
        "attention/attention.cuh",
        "  __syncthreads();\n  if (p.rope.table",
        "  if (p.rope.table",
    ),
    Mutant(
        "attention_rope: no barrier before the turned queries are read",
        "attention_rope",
        "attention/attention.cuh",
        "work.first_row, num_rows);\n    __syncthreads();\n  }",
        "work.first_row, num_rows);\n  }",
    ),
    Mutant(
        "attention_rope: turns by positions past the end of the table",
        "attention_rope",
        "attention/rotate.cuh",
        "        if (position[i] >= rope.max_positions) position[i] = -1;\n",
    ),
    Mutant(
        "attention_rope: reads positions past the last row",
        "attention_rope",
        "attention/rotate.cuh",
        "row + i * kStep < num_rows ? positions[cursor.token * rope.positions.token_stride] : -1",
        "positions[cursor.token * rope.positions.token_stride]",
    ),
    Mutant(
        "attention_rope: takes the positions of the first batch row",
        "attention_rope",
        "attention/rotate.cuh",
        "rope.positions.data + batch * rope.positions.batch_stride",
        "rope.positions.data",
    ),
    Mutant(
        "attention_rope: takes the positions of other tokens",
        "attention_rope",
        "attention/rotate.cuh",
        "positions[cursor.token * rope.positions.token_stride]",
        "positions[cursor.token]",
    ),
    Mutant(
        "attention_rope: all rows of a thread have the position of its first",
        "attention_rope",
        "attention/rotate.cuh",
        "        cursor.advance(step, p.group);\n",
    ),
    Mutant(
        "attention_rope: takes the angles of another position",
        "attention_rope",
        "attention/rotate.cuh",
        "position[i] * rope.rotary_dim",
        "position[i] * (rope.rotary_dim / 2)",
    ),
    Mutant(
        "attention_rope: turns the other way",
        "attention_rope",
        "attention/rotate.cuh",
        "b * -sine",
        "b * sine",
    ),
    Mutant(
        "attention_rope: the partner is half a head away",
        "attention_rope",
        "attention/rotate.cuh",
        "kLanes : half / 8",
        "kLanes : kLanes",
    ),
    Mutant(
        "attention_rope: turns elements past the rotated ones",
        "attention_rope",
        "attention/rotate.cuh",
        "    if (chunk * 8 >= (rope.interleaved ? rope.rotary_dim : half)) return;\n",
    ),
    Mutant(
        "attention_rope: turns a second chunk past the rotated ones",
        "attention_rope",
        "attention/rotate.cuh",
        "!rope.interleaved || partner * 8 < rope.rotary_dim",
        "true",
    ),
    Mutant(
        "attention_rope: the second chunk has the angles of the next",
        "attention_rope",
        "attention/rotate.cuh",
        "partner * 8 - kAngles / 2",
        "partner * 8",
    ),
    Mutant(
        "attention_rope: the partner lies in another bank",
        "attention_rope",
        "attention/rotate.cuh",
        "Layout::offset(at, at % 8, partner)",
        "Layout::offset(at, 0, partner)",
    ),
    Mutant(
        "attention_rope: the chunk lies in another bank",
        "attention_rope",
        "attention/rotate.cuh",
        "Layout::offset(at, at % 8, chunk)",
        "Layout::offset(at, 0, chunk)",
    ),
    Mutant(
        "attention_rope: leaves the second chunk as it was",
        "attention_rope",
        "attention/rotate.cuh",
        "        if (has_partner) store_vec(partner_to, other);\n",
    ),
    Mutant(
        "decode_attention: no barrier before the results of the warps are merged",
        "decode_attention",
        "attention/decode_attention.cuh",
        "  __syncthreads();\n\n  // Each four columns",
        "\n  // Each four columns",
    ),
    Mutant(
        "decode_attention: takes values past the length",
        "decode_attention",
        "attention/decode_warp.cuh",
        "      if (is_eager && key + kDecodeKeys > range.end) clear_values(range.end - key);\n",
    ),
    Mutant(
        "decode_attention: reads keys past the length",
        "decode_attention",
        "attention/decode_warp.cuh",
        "min(key + value_of(e), range.end - 1)",
        "key + value_of(e)",
    ),
    Mutant(
        "decode_attention: attends to keys after the query's own",
        "decode_attention",
        "attention/visibility.cuh",
        "if (at < rows.keys[e / 2].begin || at >= rows.keys[e / 2].end) scores",
        "if (at < rows.keys[e / 2].begin) scores",
    ),
    Mutant(
        "decode_attention: the first block to come merges",
        "decode_attention",
        "attention/decode_attention.cuh",
        "ticket + 1 == uint32_t(num_parts)",
        "ticket == 0",
    ),
    Mutant(
        "decode_attention: waits for a split that is not there",
        "decode_attention",
        "attention/decode_attention.cuh",
        "is_other[i] = at < num_splits && !is_own;",
        "is_other[i] = !is_own;",
    ),
    Mutant(
        "decode_attention: leaves out the block's own split",
        "decode_attention",
        "attention/decode_attention.cuh",
        "out[i] = is_own ? own_out : make_uint4(0, 0, 0, 0);",
        "out[i] = make_uint4(0, 0, 0, 0);",
    ),
    Mutant(
        "decode_attention: does not wait for the other splits",
        "decode_attention",
        "attention/decode_attention.cuh",
        "ticket + 1 == uint32_t(num_parts)",
        "ticket + 2 == uint32_t(num_parts)",
    ),
    Mutant(
        "decode_attention: leaves the tickets drawn",
        "decode_attention",
        "attention/decode_attention.cuh",
        "  if (threadIdx.x == 0) results.words[head] = kUnwritten;\n",
    ),
    Mutant(
        "rope: writes to slots past the end of the cache",
        "rope_append",
        "rope/rope.cuh",
        "valid && slot >= 0 && slot < p.max_seq_len",
        "valid && slot >= 0",
    ),
    Mutant(
        "rope: rotates by positions past the end of the table",
        "rope_append",
        "rope/rope.cuh",
        "position >= 0 && position < p.max_positions",
        "position >= 0",
    ),
    Mutant(
        "act_and_mul: goes on past the end of a row",
        "act_and_mul",
        "activation/act_and_mul.cuh",
        "  if (column >= p.intermediate_size) return;\n",
    ),
    Mutant(
        "sample: no barrier before candidates are listed",
        "sample",
        "sample/sample.cuh",
        "    if (threadIdx.x == 0) smem.num_candidates = 0;\n    __syncthreads();\n",
        "    if (threadIdx.x == 0) smem.num_candidates = 0;\n",
    ),
    Mutant(
        "sample: no barrier before the list is read",
        "sample",
        "sample/sample.cuh",
        "    });\n    __syncthreads();\n    listed =",
        "    });\n    listed =",
    ),
    Mutant(
        "sample: takes an overfull list for a whole one",
        "sample",
        "sample/sample.cuh",
        "listed = smem.num_candidates <= Config::kCapacity;",
        "listed = true;",
    ),
    Mutant(
        "sample: no barrier before keys are counted",
        "sample",
        "sample/sample.cuh",
        "smem.histogram[i] = 0;\n      __syncthreads();\n",
        "smem.histogram[i] = 0;\n",
    ),
    Mutant(
        "sample: no barrier before a digit is selected",
        "sample",
        "sample/sample.cuh",
        "      __syncthreads();\n      if (threadIdx.x < 32) select_digit(remaining);\n",
        "      if (threadIdx.x < 32) select_digit(remaining);\n",
    ),
    Mutant(
        "sample: no barrier before the selected digit is read",
        "sample",
        "sample/sample.cuh",
        "select_digit(remaining);\n      __syncthreads();\n",
        "select_digit(remaining);\n",
    ),
    Mutant(
        "sample: reads logits past the end of a row",
        "sample",
        "sample/sample.cuh",
        "    if (tail < p.vocab_size) scalar(tail);",
        "    scalar(tail);",
    ),
    Mutant(
        "decode: weights are taken before they have landed",
        "decode_step",
        "gemv/weight_stream.cuh",
        "    ptx::cp_async_wait<kStages - 1>();\n",
        "    ptx::cp_async_wait<kStages>();\n",
    ),
    Mutant(
        "decode: weights are taken before those of other lanes have landed",
        "decode_step",
        "gemv/weight_stream.cuh",
        "    ptx::cp_async_wait<kStages - 1>();\n    __syncwarp();\n",
        "    ptx::cp_async_wait<kStages - 1>();\n",
    ),
    Mutant(
        "decode: weights are fetched to where the oldest have not been taken",
        "decode_step",
        "gemv/weight_stream.cuh",
        "i < kStages; ++i) fetch();",
        "i <= kStages; ++i) fetch();",
    ),
    Mutant(
        "decode: the lanes take a chunk whose place they fetch to",
        "decode_step",
        "gemv/product.cuh",
        "      stream.take(w);\n",
        "      stream.fetch();\n      stream.take(w);\n",
    ),
    Mutant(
        "decode: odd rows are copied to the wrong half of a line",
        "decode_step",
        "gemv/weight_stream.cuh",
        "(lane % kRowLanes ^ lane / kRowLanes % 2 * 4) * 16",
        "lane % kRowLanes * 16",
    ),
    Mutant(
        "decode: odd steps are taken from the wrong half of a line",
        "decode_step",
        "gemv/weight_stream.cuh",
        "take_[0] + (lane / 4 % 2 == 0 ? 64 : -64)",
        "take_[0]",
    ),
    Mutant(
        "decode: reads weights past the last column",
        "decode_tokens",
        "gemv/weight_stream.cuh",
        "inside = lane_column() < left_ && i",
        "inside = i",
    ),
    Mutant(
        "decode: reads weights past the last row, in the last chunk",
        "decode_tokens",
        "gemv/weight_stream.cuh",
        "lane_column() < left_ && i * kCopyRows + lane / kRowLanes < rows_left_;",
        "lane_column() < left_;",
    ),
    Mutant(
        "decode: reads weights past the last row, in whole chunks",
        "decode_tokens",
        "gemv/weight_stream.cuh",
        "rows_left_ >= kTileRows ? kChunkColumns : INT_MAX",
        "kChunkColumns",
    ),
    Mutant(
        "decode: the columns past the last are not zeroed",
        "decode_step",
        "gemv/weight_stream.cuh",
        "        ptx::cp_async_16_or_zero(to_",
        "        if (inside) ptx::cp_async_16_or_zero(to_",
    ),
    Mutant(
        "decode: a run goes on with the next tile, not the block's next",
        "decode_step",
        "gemv/weight_stream.cuh",
        "run.row_step = kTileRows * s.tile_step;",
        "run.row_step = kTileRows;",
    ),
    Mutant(
        "decode: a run does not end with the group",
        "decode_tokens",
        "gemv/weight_stream.cuh",
        "slices == 1 ? s.tiles : min(s.group_tiles, s.tiles - group)",
        "s.tiles",
    ),
    Mutant(
        "decode: no barrier before the sums of the warps are read",
        "decode_step",
        "gemv/product.cuh",
        "      static_assert(kSliceChunks == 4);\n      __syncthreads();\n",
        "      static_assert(kSliceChunks == 4);\n",
    ),
    Mutant(
        "decode: no barrier before the storage of the sums is used again",
        "decode_tokens",
        "gemv/product.cuh",
        "      __syncthreads();\n    }\n    finish(",
        "    }\n    finish(",
    ),
    Mutant(
        "decode: activations are taken before the other lanes have staged theirs",
        "decode_tokens",
        "gemv/product.cuh",
        "    __syncwarp();\n    if (lane / 4 / kStagedTokens",
        "    if (lane / 4 / kStagedTokens",
    ),
    Mutant(
        "decode: activations are staged before the other lanes have taken the last",
        "decode_tokens",
        "gemv/product.cuh",
        "      }\n    }\n    __syncwarp();\n  }\n};\n",
        "      }\n    }\n  }\n};\n",
    ),
    Mutant(
        "decode: writes past the last output",
        "decode_tokens",
        "gemv/product.cuh",
        " && slot.token < num_tokens && n < out_features;",
        " && slot.token < num_tokens;",
    ),
    Mutant(
        "decode: activations are taken before they are written",
        "decode_step",
        "decode/activations.cuh",
        "    } while (__any_sync(0xffffffffu, wrong != 0));\n",
        "    } while (false);\n",
    ),
    Mutant(
        "decode: reads activations past the last column",
        "decode_step",
        "decode/activations.cuh",
        "inside[i] = i < chunks && column < in_features;",
        "inside[i] = i < chunks;",
    ),
    Mutant(
        "decode: squares are added to those of the norm before",
        "decode_step",
        "decode/activations.cuh",
        "sum = slice == 0 ? square : sum + square;",
        "sum += square;",
    ),
    Mutant(
        "decode: parts are added up before they are written",
        "decode_step",
        "gemv/flagged.cuh",
        "  } while (error != 0);\n",
        "  } while (false);\n",
    ),
    Mutant(
        "decode: the last part of down is added up again",
        "decode_step",
        "decode/step.cuh",
        "      if (first + i >= parts) continue;\n",
    ),
    Mutant(
        "decode: no barrier before the plan is read",
        "decode_step",
        "decode/step.cuh",
        "  __syncthreads();\n  const DecodePlan& plan",
        "  const DecodePlan& plan",
    ),
    Mutant(
        "decode: no barrier between attention and the product that follows",
        "decode_step",
        "decode/step.cuh",
        "      __syncthreads();  // the storage is free\n",
    ),
    Mutant(
        "decode: no barrier before the next item of attention",
        "decode_tokens",
        "decode/attend.cuh",
        "    __syncthreads();  // the storage is free\n",
    ),
    Mutant(
        "decode: no barrier before the rotated heads are read",
        "decode_step",
        "decode/attend.cuh",
        "      __syncwarp();\n    }\n    __syncthreads();\n",
        "      __syncwarp();\n    }\n",
    ),
    Mutant(
        "decode: no barrier before the results of the warps are merged",
        "decode_step",
        "decode/attend.cuh",
        "exp_scale);\n    __syncthreads();\n",
        "exp_scale);\n",
    ),
    Mutant(
        "decode: a head is turned before the warp has it",
        "decode_tokens",
        "decode/attend.cuh",
        "  __syncwarp();\n  if (norm != nullptr) {",
        "  if (norm != nullptr) {",
    ),
    Mutant(
        "decode: a head is turned before it is normed",
        "decode_step",
        "decode/attend.cuh",
        "    }\n    __syncwarp();\n  }\n#pragma unroll 1\n  for (int i = lane;",
        "    }\n  }\n#pragma unroll 1\n  for (int i = lane;",
    ),
    Mutant(
        "decode: a part's last keys are another part's",
        "decode_step",
        "decode/attend.cuh",
        "HideFrom{range.end}",
        "HideFrom{range.end + 1}",
    ),
    Mutant(
        "decode: the step counter stands still",
        "decode_step",
        "decode/step.cuh",
        "    *p.workspace += 1;\n",
    ),
]


def run_checks(library: Path, *names: str) -> list[str]:
    """What is wrong with the checks of these names: nothing where they hold."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=checks.report, args=(str(library), names, sender))
    process.start()
    sender.close()
    try:
        problems = receiver.recv()
    except EOFError:
        process.join()
        # An exit status above 0 is an exception of the check itself.
        assert process.exitcode < 0, f"the checks {names} are broken, see stderr"
        return [f"crashed with signal {-process.exitcode}"]
    process.join()
    return problems


def build_copy(csrc: Path, kernels: list[Path] | None = None) -> Path:
    """The library of a copy of csrc, of which only these kernels are compiled again; None: all."""
    sources = product_sources(csrc)
    if kernels is not None:
        # They come first: other files may hold instances of the same templates.
        others = [CSRC / path.relative_to(csrc) for path in sources if path not in kernels]
        sources = [*kernels, *others]
    with emulator_tools():
        return build_library(csrc.parent / "kernels.so", sources, csrc, UNOPTIMIZED)


@pytest.fixture
def csrc(tmp_path):
    return shutil.copytree(CSRC, tmp_path / "csrc")


def test_checks_hold(csrc):
    assert run_checks(build_copy(csrc), *checks.CHECKS) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_fails(mutant, csrc):
    mutant.apply(csrc)
    kernels = sorted(csrc.glob(checks.CHECKS[mutant.check].sources))
    assert kernels
    assert run_checks(build_copy(csrc, kernels), mutant.check) != []
