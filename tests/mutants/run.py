"""Plant one defect at a time in a copy of the project; a named test must catch each.

make mutants            all of them
python tests/mutants/run.py "gate not folded" ...      some
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """`find` stands exactly once in `file`, below prunadapt_ds; `test` passes without and fails with the defect."""

    name: str
    file: str
    find: str
    replace: str
    test: str


IMPORTANCE = "tests/unit/test_importance.py"
RESIZE = "tests/unit/test_resize.py"
BUDGET = "tests/unit/test_budget.py"
SHRINK = "tests/distributed/test_shrink.py"
LAWS = "tests/distributed/test_laws.py"
RESUME = "tests/integration/test_resume.py"
DAMAGED = f"{RESUME}::test_killed_in_a_decision_with_a_damaged_checkpoint"
CHECKPOINT = "tests/unit/test_checkpoint.py"
BAD_INPUT = "tests/unit/test_bad_input.py"

MUTANTS = (
    Mutant("coefficient not undone", "importance.py", "d = self._d * inverse[:, None]", "d = self._d",
           f"{IMPORTANCE}::test_same_for_every_split[halves-bert]"),
    Mutant("accumulation not undone", "step.py", "batch.weights / session.sampler.accumulation_steps", "batch.weights",
           f"{LAWS}::test_scores_do_not_depend_on_the_split[1x4x2]"),
    Mutant("square of the mean", "importance.py", "self._sums[0] += d.square().sum(0)",
           "self._sums[0] += d.mean(0).square() * real.sum()",
           f"{IMPORTANCE}::test_equals_autograd_sample_by_sample[bert]"),
    Mutant("missing all-reduce", "importance.py", "flat = dist_sum(flat).cpu()", "flat = flat.cpu()",
           f"{LAWS}::test_scores_do_not_depend_on_the_split[2x4]"),
    Mutant("idle row counted as a sample", "importance.py", "real = self._coefficients > 0  # [B]",
           "real = self._coefficients >= 0", f"{IMPORTANCE}::test_same_for_every_split[idle-rank-bert]"),
    Mutant("tail samples dropped", "batches.py", "return -(-self.num_samples // self.samples_per_step)",
           "return self.num_samples // self.samples_per_step", f"{LAWS}::test_every_sample_counts_once_an_epoch[37-4-2]"),
    Mutant("tail weighted like a full step", "batches.py", "weight = self.world_size * self.accumulation_steps / len(samples)",
           "weight = 1 / self.micro_batch_size", f"{LAWS}::test_every_sample_counts_once_an_epoch[37-4-2]"),
    Mutant("padding counted", "importance.py", "mask = self._token_mask.to(torch.float32)  # [B, all tokens]",
           "mask = torch.ones_like(self._token_mask, dtype=torch.float32)",
           f"{IMPORTANCE}::test_activations_ignore_padding"),
    Mutant("counted again in recomputation", "importance.py", "and self.activations and not recomputing",
           "and self.activations", f"{IMPORTANCE}::test_same_under_gradient_checkpointing[False-bert]"),
    Mutant("cut units not scored", "gates.py", "d[:, cut] = sum_products(x_cut, dy.index_select(2, cut)) * g[cut]", "pass",
           f"{IMPORTANCE}::test_equals_autograd_sample_by_sample[bert]"),
    Mutant("gate gradient not divided by g", "gates.py", "d_delta = r.sum(0) / safe", "d_delta = r.sum(0)",
           f"{IMPORTANCE}::test_gate_gradient_equals_autograd"),
    Mutant("gate rounded to bf16", "gates.py", "return torch.addcmul(x, x, change)", "return x * (1 + change)",
           f"{IMPORTANCE}::test_gate_keeps_small_updates_in_bf16"),
    Mutant("what a norm's output hides is not kept", "norms.py", "return found.index_copy_(-1, faint, kept)", "return found",
           "tests/unit/test_norms.py::test_numbers_and_gradients_are_those_of_the_plain_norm"),
    Mutant("LoRA not sliced with its units", "resize.py",
           "slice_linear(getattr(module, matrix)[ADAPTER], index, side, lora_axis)",
           "slice_linear(getattr(module, matrix)[ADAPTER], torch.arange(len(index)), side, lora_axis)",
           f"{RESIZE}::test_masked_equals_resized[bert-unequal]"),
    Mutant("moments reset at a shrink", "state.py", "_write(engine, parameter, key, _from_rank_0(",
           "(lambda value: None)(_from_rank_0(",
           f"{SHRINK}::test_every_stage_shrinks[3-1]"),
    Mutant("moments sliced at the wrong rows", "state.py", "tensors[name].index_select(axis, index)",
           "tensors[name].narrow(axis, 0, len(index))", f"{SHRINK}::test_every_stage_shrinks[3-1]"),
    Mutant("Adam counts from zero after a shrink", "state.py", "_make_moments(engine, state.steps)", "_make_moments(engine, 1)",
           f"{SHRINK}::test_every_stage_shrinks[3-1]"),
    Mutant("cut modules stay whole", "engine.py", "sharded[0].convert_to_zero_parameters(param_list=new)", "pass",
           f"{SHRINK}::test_never_more_than_one_module_is_whole"),
    Mutant("what is gone does not count as cut", "budget.py", "scores = scores.masked_fill(gone, -torch.inf)  # before all others",
           "pass", "tests/unit/test_shrink.py::test_units_that_are_gone_stay_gone"),
    Mutant("rebuilds whatever it costs", "shrink.py", "return rebuild < keep", "return rebuild < float('inf')",
           "tests/unit/test_shrink.py::test_the_rebuilds_are_the_cheapest_of_all_ways"),
    Mutant("near sizes decide as far ones do", "clocks.py", "precision = 1 / (expected / 2) ** 2", "precision = 1e-3 / expected**2",
           "tests/unit/test_shrink.py::test_sizes_near_each_other_decide_little"),
    Mutant("steps that record are timed with the others", "clocks.py",
           "(self.recording if records else self.plain)", "self.plain",
           "tests/distributed/test_shrink.py::test_steps_that_record_are_timed_apart"),
    Mutant("steps differ by split", "batches.py", "whole = self.num_samples // self.samples_per_step",
           "whole = self.num_samples // self.samples_per_step - self.world_size",
           "tests/unit/test_batches.py::test_a_step_has_the_same_samples_for_every_split"),
    Mutant("gate entries not sliced", "resize.py", "gate.delta = select(gate.delta, units, 0)",
           "gate.delta = select(gate.delta, torch.arange(len(units)), 0)",
           f"{RESIZE}::test_masked_equals_resized[bert-unequal]"),
    Mutant("bias not sliced", "models/modeling_prunadapt.py", "module.bias = select(module.bias, index, 0)",
           "module.bias = select(module.bias, torch.arange(len(index)), 0)",
           f"{RESIZE}::test_masked_equals_resized[bert-unequal]"),
    Mutant("parts not offset", "models/modeling_prunadapt.py", "offset += num_units * width", "offset += 0",
           f"{RESIZE}::test_masked_equals_resized[gpt2-unequal]"),
    Mutant("split size not reset", "models/families.py", '(("attn", "split_size", "q"), ("attn", "num_heads", "heads"))',
           '(("attn", "num_heads", "heads"),)', f"{RESIZE}::test_masked_equals_resized[gpt2-unequal]"),
    Mutant("head count not reset (DeBERTa)", "models/families.py",
           '("attention.self", "num_attention_heads", "heads"),  # it views (num_attention_heads, -1)', "",
           f"{RESIZE}::test_masked_equals_resized[deberta-v2-unequal]"),
    Mutant("head count not reset (OPT)", "models/families.py", 'attributes=(("self_attn", "num_heads", "heads"),),', "",
           f"{RESIZE}::test_masked_equals_resized[opt-unequal]"),
    Mutant("query heads per key not reset", "models/families.py",
           '(("self_attn", "num_key_value_groups", "sharing"), *(fused_attributes if fused else ()))',
           "fused_attributes if fused else ()", f"{RESIZE}::test_masked_equals_resized[llama-mqa-unequal]"),
    Mutant("shared key and value cut with the heads", "models/modeling_prunadapt.py",
           "torch.cat([*blocks, torch.arange(offset, offset + self.tail)])", "torch.cat(blocks)",
           f"{RESIZE}::test_masked_equals_resized[phi3-mqa-unequal]"),
    Mutant("flattened tokens taken for samples", "gates.py", "return self(x.unflatten(0, (rows, -1))).flatten(0, 1)",
           "return self(x.unflatten(0, (-1, rows))).flatten(0, 1)",
           f"{IMPORTANCE}::test_equals_autograd_sample_by_sample[opt]"),
    Mutant("the cache's first layer may go", "models/layouts.py", "return tuple(int(kinds.index(kind) == i) for i, kind",
           "return tuple(0 for i, kind", "tests/unit/test_families.py::test_what_must_stay_stays_at_the_highest_sparsity[llama]"),
    Mutant("padding token of the tokenizer not told", "backbone.py", "    config.pad_token_id = tokenizer.pad_token_id",
           "    pass", "tests/unit/test_families.py::test_a_decoder_learns_the_padding_token_of_its_tokenizer"),
    Mutant("output bias lost with its sub-layer", "models/modeling_prunadapt.py",
           "remains = BiasOnly(output.weight.shape[axis], output.bias)",
           "remains = BiasOnly(output.weight.shape[axis], None)", f"{RESIZE}::test_masked_equals_resized[bert-no-heads]"),
    Mutant("a piece's gradients reduced too early", "zero3.py", "if not torch.is_grad_enabled() or hidden.requires_grad:",
           "if True:", "tests/unit/test_backbone.py::test_the_input_of_a_block_in_one_piece_has_a_gradient"),
    Mutant("blocks kept for the backward pass against the configuration", "zero3.py", "// 2)\n", "// 2 or PIECE_ELEMENTS)\n",
           "tests/unit/test_backbone.py::test_small_blocks_are_fetched_as_one_piece"),
    Mutant("the first engine copies the group", "distributed.py", "    groups._WORLD_GROUP = dist.group.WORLD\n", "",
           "tests/integration/test_faults.py::test_one_rank_dies"),
    Mutant("backward pass left to the destroyed engine", "zero3.py", '("pre_bwd_fn", "post_bwd_fn", ', "(",
           f"{LAWS}::test_loss_curve_does_not_depend_on_the_split[checkpointing-modules]"),
    Mutant("a cut LoRA layer fetches what it had", "zero3.py", '"post_bwd_fn", "_external_params"', '"post_bwd_fn"',
           f"{LAWS}::test_loss_curve_does_not_depend_on_the_split[checkpointing-modules]"),
    Mutant("the dense parameters are kept in memory", "zero3.py",
           "pop(name, None)\n    _forget_releases()\n", "pop(name, None)\n",
           "tests/distributed/test_shrink.py::test_the_dense_parameters_are_gone"),
    Mutant("an evaluation keeps the whole model", "logits.py",
           "engine.eval()\n    zero3.forget_trace(engine)\n", "engine.eval()\n",
           "tests/distributed/test_laws.py::test_an_evaluation_keeps_no_weights_for_a_backward_pass"),
    Mutant("one piece although it runs many times", "session.py", "[] if loaded.family.shares_layers else list(", "list(",
           f"{LAWS}::test_gradients_of_blocks_in_one_piece"),
    Mutant("an old engine ends twice", "engine.py", "    engine.destroy = _nothing", "    pass",
           "tests/distributed/test_shrink.py::test_an_engine_that_outlives_a_shrink_leaves_the_next_one_alone[1]"),
    Mutant("a parameter keeps its old engine", "engine.py", '"_zero_optimizer", ', "",
           "tests/distributed/test_shrink.py::test_with_the_optimizer_on_the_host_no_engine_outlives_a_shrink[1]"),
    Mutant("shards of what was cut stay", "engine.py", "        shard.data = shard.new_empty(0)\n", "        pass\n",
           "tests/distributed/test_shrink.py::test_shards_of_what_was_cut_are_gone_whoever_refers_to_them"),
    Mutant("a recomputed module drops its own weights", "engine.py", "        zero3.keep_recomputed(engine.optimizer)\n", "",
           "tests/distributed/test_shrink.py::test_a_block_without_feed_forward_is_computed_again"),
    Mutant("a part is taken for the first one", "zero3.py", "start = parameter.ds_zero_partition_rank * shard.ds_numel",
           "start = 0", "tests/distributed/test_loading.py::test_streamed_is_what_from_pretrained_loads"),
    Mutant("rows from another place in a part", "zero3.py", "parameter.ds_tensor[begin - start : end - start]",
           "parameter.ds_tensor[: end - begin]", "tests/distributed/test_loading.py::test_an_export_is_the_same_from_parts"),
    Mutant("gate not folded", "export.py", "weight if gate is None else weight.mul_(folded_scale(gate, cut, rows))", "weight",
           f"{RESIZE}::test_folded_and_narrowed_equals_masked[bert-unequal]"),
    Mutant("LoRA not merged", "export.py", "alpha=module.scaling[ADAPTER])", "alpha=0)",
           f"{RESIZE}::test_folded_and_narrowed_equals_masked[bert-unequal]"),
    Mutant("bias missing in the cost", "models/structure.py", "return sum(projection.parts) * (other_features + bias)",
           "return sum(projection.parts) * other_features",
           f"{RESIZE}::test_cost_model_counts_what_is_really_left[bert-unequal]"),
    Mutant("layers ranked one after another", "budget.py", "order = torch.argsort(densities, stable=True)",
           "order = torch.arange(len(densities))", f"{BUDGET}::test_ranking_is_global_over_layers_and_kinds"),
    Mutant("score not divided by cost", "budget.py", "densities = scores / costs", "densities = scores + 0 * costs",
           f"{BUDGET}::test_heads_and_neurons_are_weighed_by_their_cost"),
    Mutant("unstable ties", "budget.py", "order = torch.argsort(scores, stable=True)",
           "order = torch.argsort(scores.flip(0), stable=True).flip(0)", f"{BUDGET}::test_equal_scores_are_cut_by_index"),
    Mutant("uniform layers differ", "budget.py", "if not uniform:\n        return torch.arange(sum(counts))",
           "if True:\n        return torch.arange(sum(counts))",
           "tests/integration/test_exports.py::test_uniform_within_one_step"),
    Mutant("a skipped layer leaves the graph", "gates.py", " + 0 * output", "",
           f"{RESIZE}::test_a_skipped_layer_has_gradients_of_zero"),
    Mutant("norms of a skipped layer counted", "models/structure.py", "if count} if self.skips", "} if self.skips",
           f"{RESIZE}::test_cost_model_counts_what_is_really_left"),
    Mutant("depth overshoots for what is gone", "budget.py", "off = max(0.0, abs(", "off = min(0.0, abs(",
           f"{BUDGET}::test_a_layer_stays_where_it_would_overshoot_with_what_is_gone"),
    Mutant("what is gone comes back", "budget.py", "if gone is None else ~gone", "if True else ~gone",
           f"{BUDGET}::test_what_is_gone_stays_gone_and_depth_does_not_overshoot_for_it"),
    Mutant("padding beyond the positions", "batches.py", "self.tokenizer.model_max_length", "10**9",
           "tests/unit/test_batches.py::test_padding_stays_within_what_the_model_takes"),
    Mutant("the deepest model wins", "budget.py", "min(tried, key=lambda one: one[:2])", "min(tried, key=lambda one: one[0])",
           f"{BUDGET}::test_the_least_important_layers_go_where_that_costs_less"),
    Mutant("layers not counted anew", "formats.py", 'return f"{layers}.{number[old]}.{rest}"', "return name",
           "tests/integration/test_exports.py::test_a_stranger_computes_the_same"),
    Mutant("a given adapter's values not read", "given_adapter.py", "parameters[ours].copy_(opened.get_tensor(keys[name]))", "pass",
           "tests/unit/test_given_adapter.py::test_the_model_answers_as_peft_s"),
    Mutant("times not weighed together", "budget.py", "if bool((chain[there].diff() < 0).any()):", "if False:",
           f"{BUDGET}::test_no_other_choice_loses_less_for_its_saving"),
    Mutant("a block timed at its full width", "latency.py",
           'narrow(holder, replace(layout, layers="layers"), [list(kept)])', "pass",
           "tests/unit/test_latency.py::test_each_width_is_timed[bert]"),
    Mutant("times taken anew on a resume", "setup.py",
           "if saved is not None:\n        return saved", "if False:\n        return saved",
           f"{RESUME}::test_a_speed_is_met_and_a_resumed_run_keeps_its_table"),
    Mutant("zeros at the wrong rows", "formats.py", ".index_copy_(axis, index, tensor)",
           ".index_copy_(axis, torch.arange(len(index)), tensor)",
           "tests/integration/test_exports.py::test_a_stranger_computes_the_same[phi3-unequal-padded]"),
    Mutant("a skipped layer loses its score", "train.py", "seen=session.plan.passed())", "seen=session.plan.passed() | True)",
           f"{LAWS}::test_a_skipped_layer_keeps_its_score"),
    Mutant("disagreement ignored", "distributed.py", "if not torch.equal(row, everyone[0])]", "if False]",
           f"{LAWS}::test_ranks_that_disagree_stop"),
    Mutant("frozen tensors persist", "engine.py", '"stage3_param_persistence_threshold": 0}}',
           '"stage3_param_persistence_threshold": 100_000}}',
           f"{LAWS}::test_frozen_weights_are_sharded_and_untouched[lora]"),
    Mutant("head left at random", "backbone.py", "if n in new or n.startswith(_prefixes(family.task_head)))", "if False)",
           f"{LAWS}::test_the_whole_head_trains"),
    Mutant("resume without moments", "state.py", "parameters.items() if state.steps else ():", "():", DAMAGED),
    Mutant("resume without the open window", "importance.py", "self._sums = flat[:-1].view(len(STATISTICS), self.num_units)",
           "self._sums = torch.zeros(len(STATISTICS), self.num_units)", f"{CHECKPOINT}::test_a_window_goes_on_where_it_stood"),
    Mutant("window counted on every rank", "snapshot.py", "session.recorder.restore(window[rank])",
           "session.recorder.restore(window.sum(0))",
           f"{RESUME}::test_killed_within_a_window"),
    Mutant("resume without the average", "snapshot.py", 'session.scores.value = tensors.get("scores")', "pass",
           f"{RESUME}::test_killed_and_resumed_is_uninterrupted[in a shrink]"),
    Mutant("resume without random states", "snapshot.py", 'torch.set_rng_state(tensors["random/cpu"][rank].clone())', "pass",
           DAMAGED),
    Mutant("resume without the teacher", "snapshot.py", 'session.teacher = tensors.get("teacher")', "session.teacher = None",
           f"{RESUME}::test_killed_and_resumed_is_uninterrupted[in a shrink]"),
    Mutant("resume without the teacher's mean", "snapshot.py", 'WeightAverage(taken("average/", tensors), saved["average_count"])',
           "WeightAverage()", DAMAGED),
    Mutant("losses of the open interval lost", "snapshot.py", "session.losses = list(", "session.losses = 0 * list(", DAMAGED),
    Mutant("checksum not verified", "checkpoint.py", "if identity(folder / name) != written:", "if False:",
           f"{CHECKPOINT}::test_a_flipped_bit_is_seen[tensors.safetensors-0.5]"),
    Mutant("the watchdog sleeps on", "watchdog.py", "    finally:\n        beat()\n", "    finally:\n        pass\n",
           "tests/unit/test_watchdog.py::test_a_save_rests_and_then_steps_go_on"),
    Mutant("an old folder goes file by file", "files.py", "        folder.rename(leaving)\n", "        shutil.rmtree(folder)\n",
           f"{CHECKPOINT}::test_a_folder_is_whole_or_absent_whenever_its_writer_dies"),
    Mutant("begins anew over damaged checkpoints", "resume.py", "if found is None and damaged:", "if False:",
           f"{CHECKPOINT}::test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew"),
    Mutant("checkpoint's own digest not verified", "checkpoint.py", "if digest != _digest(content):", "if False:",
           f"{CHECKPOINT}::test_a_flipped_bit_is_seen[checkpoint.json-0.9]"),
    Mutant("metrics not truncated", "tracking.py", "self._file.truncate(min(metrics_bytes, self._file.tell()))", "pass",
           "tests/unit/test_report.py::test_metrics_go_on_where_the_checkpoint_was"),
    Mutant("a run that goes on counts anew", "tracking.py", "initial=step", "initial=0",
           "tests/unit/test_progress.py::test_the_bar_goes_on_where_the_run_did_and_keeps_what_it_shows"),
    Mutant("phases that are over are announced", "outline.py", "max(step, first), last)", "first, last)",
           "tests/unit/test_outline.py::test_a_run_that_goes_on_names_the_phases_that_are_left"),
    Mutant("gathers are not sent", "zero_costs.py", 'return parts["gather"] + parts["reduce"]', 'return parts["reduce"]',
           "tests/distributed/test_traffic.py::test_what_is_sent_is_what_deepspeed_counts"),
    Mutant("one rank stops alone", "keeper.py", "self.stops, self.due = self.stops or stops",
           "self.stops, self.due = bool(self.signals.name)",
           f"{RESUME}::test_asked_to_stop_and_started_again[SIGUSR1-1]"),
    Mutant("first warm-up step is zero", "schedule.py", "return (step + 1) / self.warmup_steps",
           "return step / self.warmup_steps", "tests/unit/test_schedule.py::test_learning_rate_factor"),
    Mutant("a teacher is followed where it is wrong", "objective.py", "(teacher.words == target)", "(teacher.words >= 0)",
           "tests/unit/test_language.py::test_of_few_words_the_others_are_one_outcome"),
    Mutant("a teacher that knows nothing is followed", "distillation.py", "distributed.broadcast_object(r2 >= least)", "True",
           "tests/distributed/test_teacher.py::test_a_teacher_that_explains_too_little_is_not_followed"),
    Mutant("another row's words", "token_teacher.py", "torch.tensor([parts.number, end - count, count])",
           "torch.tensor([parts.number, 0, count])",
           "tests/unit/test_language.py::test_the_teacher_s_words_are_found_again"),
    Mutant("a teacher's files not verified", "token_teacher.py", "if files.identity(folder / name) != written:", "if False:",
           "tests/unit/test_language.py::test_a_teacher_that_is_not_whole_is_refused_before_any_step"),
    Mutant("teacher of the last step alone", "teacher.py", "self.sums[name] + master for", "master * (self.count + 1) for",
           "tests/distributed/test_teacher.py::test_the_engine_gets_the_mean_and_its_own_weights_back[3-2]"),
    Mutant("student goes on from the mean", "teacher.py", "        state.write_masters(engine, learnt)", "        pass",
           "tests/distributed/test_teacher.py::test_the_engine_gets_the_mean_and_its_own_weights_back[3-2]"),
    Mutant("teacher never leaves", "schedule.py", "return min(1.0, max(0.0, (total_steps - step) / max(1, total_steps - first)))",
           "return 1.0", "tests/unit/test_schedule.py::test_the_teacher_counts_from_the_first_decision_and_no_more_at_the_end"),
    Mutant("TMP does not normalise layers", "tmp.py", "scores.double().norm(dim=1, keepdim=True).clamp(min=1e-20)", "1",
           "tests/unit/test_tmp.py::test_layers_are_normalised_before_heads_are_compared"),
    Mutant("answers in another order of labels", "labels.py", "return logits if found is None else logits[:, found]",
           "return logits", "tests/unit/test_submission.py::test_labels_in_another_order_are_told_by_their_names"),
    Mutant("index restarts in every chunk", "predict.py", "count += len(logits)", "count = 0",
           "tests/unit/test_predict.py::test_every_row_in_order_with_names_and_probabilities"),
    Mutant("batches differ by ranks", "batches.py", "mine = start + rank * batch_size", "mine = start + rank",
           "tests/unit/test_predict.py::test_ranks_together_compute_the_batches_of_one"),
    Mutant("half a file left behind", "predict.py", "with files.whole_file(Path(path)) as file:", 'with open(path, "w") as file:',
           "tests/unit/test_predict.py::test_a_late_mistake_leaves_nothing"),
    Mutant("a test file with a hole is answered", "data/glue.py", "if index >= len(row) or row[index] != str(count):", "if False:",
           "tests/unit/test_submission.py::test_damaged_test_files"),
    Mutant("the base model's licence is lost", "card.py", "if key in base}", "if key not in base}",
           "tests/unit/test_card.py::test_what_a_folder_s_card_states"),
    Mutant("others may write", "files.py", "os.umask(before | 0o022)", "os.umask(before)",
           "tests/unit/test_security.py::test_files_are_the_owners_to_write_whatever_the_umask"),
    Mutant("a graph is not compared", "graphs.py", 'if not parity["max_abs_logit_diff"] <= parity["tolerance"]:', "if False:",
           "tests/integration/test_graphs.py::test_a_graph_that_differs_leaves_nothing"),
    Mutant("exports of other weights stay", "graphs.py", 'discard(run_dir / "exports" / kind)', "pass",
           f"{RESUME}::test_a_killed_run_is_exported_from_its_newest_intact_checkpoint"),
    Mutant("any modelling file runs", "reexport.py",
           "return (folder / formats.MODELING_FILE).read_bytes() == ours.read_bytes() and all(", "return all(",
           f"{BAD_INPUT}::test_runs_to_export[other code]"),
    Mutant("a host alone cannot open a model", "backbone.py", "opened = distributed.together(", "opened = (lambda work: work())(",
           "tests/integration/test_hub.py::test_a_host_that_alone_lacks_a_file_ends_all_ranks[tokenizer.json-has no tokenizer]"),
    Mutant("made-up tokenizer", "model_folder.py",
           "    if not has_tokenizer(folder):", "    if False:",
           f"{BAD_INPUT}::test_model_folders[no tokenizer]"),
    Mutant("steps of neighbouring jobs share a port", "launchers.py", "(64 * job + step % 64) % STEP_PORTS",
           "(7 * job + step) % STEP_PORTS",
           "tests/unit/test_launchers.py::test_steps_of_neighbouring_jobs_have_ports_of_their_own"),
    Mutant("a port that the system hands out", "launchers.py", "port in (*usual, 0)", "port in (0,)",
           "tests/unit/test_launchers.py::test_a_free_port_is_one_that_the_system_hands_to_nobody"),
    Mutant("patience counted from the last import", "launchers.py", "return max(started + limit, now + min(",
           "return max(now + limit, now + min(",
           "tests/unit/test_launchers.py::test_patience_is_counted_from_the_start_of_the_program"),
    Mutant("DeepSpeed's schema not asked", "ds_config.py", "problems += _schema_problems(values, path)", "pass",
           f"{BAD_INPUT}::test_ds_configs[bucket is a text]"),
    Mutant("other options are seeds", "compare.py", "return self.key, tuple(sorted(self.options.items()))", "return self.key",
           "tests/unit/test_compare.py::test_what_differs_in_an_option_is_no_seed_of_the_other"),
    Mutant("a run named twice counts twice", "compare.py",
           "list({run.folder.resolve(): run for run in reversed(found)}.values())[::-1]", "found",
           "tests/unit/test_compare.py::test_a_run_named_twice_counts_once"),
    Mutant("a run's length is forgotten", "trained_folder.py", "if type(found) is int and found > 0:", "if False:",
           "tests/unit/test_predict.py::test_inputs_are_cut_as_the_run_cut_them"),
    Mutant("a default of 0 is hidden", "options.py", "if o.default is not None and o.default is not False:",
           "if o.default not in (None, False):", "tests/unit/test_console.py::test_help_has_every_default"),
    Mutant("small pages", "environment.py", '"THP_MEM_ALLOC_ENABLE", "1"', '"THP_MEM_ALLOC_ENABLE", "0"',
           "tests/unit/test_console.py::test_large_tensors_rest_on_huge_pages"),
    Mutant("first rows compared with all", "finish.py", "{name: min(len(logits) for logits in pair)", "{name: len(pair[0])",
           "tests/integration/test_runs.py::test_a_uniform_run_loads_with_stock_classes"),
    Mutant("addresses of an earlier pass are known", "memory.py", "self._seen.clear()", "pass",
           "tests/unit/test_memory.py::test_the_most_that_any_pass_saves"),
    Mutant("another run's folder is taken", "resume.py", "_refuse_another_run(Path(config.output.output_dir), asked)", "pass",
           f"{CHECKPOINT}::test_going_on_from_elsewhere_takes_no_other_runs_folder"),
    Mutant("the file beats the command line", "ds_config.py", '("optimizer.params.lr", adam.get("lr"), "learning_rate"),',
           "", f"{BAD_INPUT}::test_ds_configs[rate against the option]"),
    Mutant("scores alone empty the metrics", "setup.py", "records=not config.prune.score_only", "records=True",
           f"{LAWS}::test_scores_do_not_depend_on_the_split[2x4]"),
    Mutant("an option without effect is taken", "options.py", 'limits["choices"] and theirs not in taken:',
           'limits["choices"] and False:', "tests/unit/test_config.py::test_contradictions"),
    Mutant("hosts hold other files", "distributed.py", "if outcome and outcome != found[0]", "if False",
           f"{LAWS}::test_hosts_that_hold_other_files_stop"),
    Mutant("a head in another order", "labels.py", "parameter.copy_(parameter[order].clone())", "pass",
           "tests/unit/test_given_adapter.py::test_a_head_that_knows_the_classes_in_another_order_is_put_into_ours"),
    Mutant("all ranks hold a checkpoint", "snapshot.py", "keep=distributed.rank() == 0", "keep=True",
           f"{LAWS}::test_a_checkpoint_is_gathered_where_it_is_written"),
    Mutant("half a group of neurons stays", "models/structure.py", "ceil(share * s.num_units / group) * group",
           "ceil(share * s.num_units)",
           "tests/unit/test_budget.py::test_what_outer_layers_keep_can_be_reached_by_cutting_whole_groups"),
    Mutant("stray quotation marks swallow rows", "data/readers.py", "if len(plain) > len(rows) and", "if False and",
           "tests/unit/test_data_files.py::test_two_stray_quotation_marks_swallow_no_rows_between_them"),
    Mutant("figures of an older run", "glue_table.py", "and not _failed_since(folder)", "",
           "tests/unit/test_glue_table.py::test_figures_of_a_run_are_not_those_of_a_later_job_that_was_refused"),
    Mutant("a number of heads that cannot be said", "models/layouts.py", "heads if len(others) < heads[-1] - fewest else ()", "()",
           "tests/unit/test_families.py::test_numbers_of_heads_that_a_stock_configuration_takes[llama-mha-sayable0]"),
    Mutant("a stopped proof has failed", "proof.py", "if done.returncode == -number:", "if False:",
           "tests/integration/test_launchers.py::test_ctrl_c_while_the_export_is_proven"),
    Mutant("one micro-batch's gradients are sent", "zero_costs.py", "(steps if stage >= 2 else 1)", "1",
           "tests/distributed/test_traffic.py::test_what_is_sent_is_what_deepspeed_counts[2-2]"),
    Mutant("a response begins with a space", "data/language.py",
           "if both[: len(before)] == before else ids(text)", "if False else ids(text)",
           "tests/unit/test_language.py::test_prompt_and_response_are_joined_as_they_are_written"),
    Mutant("padded on the left, labelled on the right", "trained_folder.py", "if is_decoder or tokenizer.pad_token_id is None:",
           "if tokenizer.pad_token_id is None:",
           "tests/unit/test_language.py::test_a_decoder_of_no_family_is_scored_as_row_by_row"),
    Mutant("one mistake of a DeepSpeed file hides others", "ds_config.py", "problems += _schema_problems(values, path)",
           "problems += problems or _schema_problems(values, path)",
           "tests/unit/test_bad_input.py::test_mistakes_of_a_ds_config_are_said_together"),
    Mutant("killed checkpoints pile up", "checkpoint.py", "    sweep(root)\n", "",
           f"{CHECKPOINT}::test_what_a_killed_writer_left_goes_with_the_next"),
    Mutant("biases and norms decay", "engine.py", "weight_decay if decays else 0.0", "weight_decay",
           "tests/unit/test_backbone.py::test_what_decays_and_how_fast_it_learns"),
    Mutant("betas and eps of the file forgotten", "engine.py",
           'options = {k: adam[k] for k in ("betas", "eps") if adam.get(k) is not None}', "options: dict[str, Any] = {}",
           "tests/unit/test_backbone.py::test_what_decays_and_how_fast_it_learns"),
    Mutant("the file's learning rate forgotten", "session.py", 'asked = self.ds.adam.get("lr") or self.config.train.learning_rate',
           "asked = self.config.train.learning_rate", f"{LAWS}::test_the_optimizer_is_what_the_deepspeed_file_says[0]"),
    Mutant("KL the other way round", "objective.py", 'F.kl_div(student, teacher, reduction="none", log_target=True)',
           'F.kl_div(teacher, student, reduction="none", log_target=True)',
           "tests/unit/test_batches.py::test_the_loss_is_what_its_formula_says"),
    Mutant("the teacher does not fade", "distillation.py", "pruning.teacher_factor(step, session.total_steps) if", "1.0 if",
           "tests/distributed/test_traffic.py::test_a_run_writes_it_down_and_it_falls_with_the_model"),
    Mutant("TMP's ranks forgotten", "one_shot.py", "session.rank_per_layer = selection.rank_per_layer", "pass",
           f"{LAWS}::test_tmp_adapts_what_its_paper_does"),
    Mutant("TMP adapts everything", "setup.py", 'only_head_inputs = config.prune.method == "tmp"', "only_head_inputs = False",
           f"{LAWS}::test_tmp_adapts_what_its_paper_does"),
    Mutant("only the first development set is proven", "proof.py", "torch.cat([pair[i].flatten() for pair in pairs.values()])",
           "next(iter(pairs.values()))[i].flatten()",
           "tests/unit/test_latency.py::test_the_worst_logit_of_all_sets_is_what_is_compared"),
    Mutant("a looser proof", "proof.py", "TOLERANCE = 1e-4", "TOLERANCE = 9e-4",
           "tests/integration/test_runs.py::test_a_task_with_two_development_sets"),
    Mutant("slower is called faster", "reload.py", "latency([dense, model], **options, device=device)",
           "latency([model, dense], **options, device=device)",
           "tests/unit/test_latency.py::test_the_dense_model_is_timed_beside_the_exported_one"),
    Mutant("memory that was there before counts", "memory.py", '_status_bytes("RssAnon")', "0",
           "tests/unit/test_memory.py::test_a_mark_is_of_the_time_since_the_last_one"),
    Mutant("a mark goes on from the last one", "memory.py",
           "int(distributed.dist_max(self.peak.bytes()))\n        self.peak.reset()\n",
           "int(distributed.dist_max(self.peak.bytes()))\n",
           "tests/unit/test_memory.py::test_a_mark_is_of_the_time_since_the_last_one"),
    Mutant("shards counted by elements", "memory.py", "total += shard.numel() * shard.element_size()", "total += shard.numel()",
           f"{LAWS}::test_frozen_weights_are_sharded_and_untouched[lora]"),
    Mutant("dropout stays", "backbone.py", "module.p = 0.0", "pass",
           "tests/unit/test_backbone.py::test_dropout_is_off_in_every_family[bert]"),
    Mutant("scores have no memory", "setup.py", "scores=ScoreAverage(config.prune.score_ema)", "scores=ScoreAverage(0.0)",
           "tests/integration/test_runs.py::test_options_that_shape_a_run"),
    Mutant("an epoch is a step", "setup.py", "config.train.num_train_epochs * sampler.steps_per_epoch",
           "config.train.num_train_epochs",
           "tests/integration/test_runs.py::test_options_that_shape_a_run"),
    Mutant("learning rates fall while units are cut", "train.py",
           'level = pruning.end_step if pruning and train.lr_scheduler_type == "warmup_stable_decay" else 0', "level = 0",
           "tests/integration/test_runs.py::test_options_that_shape_a_run"),
    Mutant("a random order that is none", "importance.py",
           "torch.rand(num_units, generator=torch.Generator().manual_seed(window.seed))", "torch.ones(num_units)",
           f"{IMPORTANCE}::test_criteria"),
    Mutant("gradients summed in bf16", "ds_config.py", 'if dtype == "bf16" and stage >= 2 and',
           'if dtype == "bf16" and stage > 3 and',
           f"{SHRINK}::test_masters_are_carried_in_fp32_under_bf16[3-2]"),
    Mutant("an error of one rank waits for the others", "entry.py", "            distributed.end_if_it_would_wait(error)\n", "",
           "tests/unit/test_entry.py::test_an_error_of_one_rank_does_not_wait_for_the_others"),
    Mutant("exports are float32 whatever was loaded", "finish.py", "or session.backbone.stored_dtype", 'or "float32"',
           "tests/integration/test_runs.py::test_dropout_bf16_and_an_export_in_low_precision"),
    Mutant("long work is waited for in silence", "distributed.py", "                goes_on()\n", "                pass\n",
           f"{LAWS}::test_work_of_one_rank_may_take_longer_than_a_collective_may"),
)  # fmt: skip


def passes(project: Path, *tests: str) -> bool:
    """Whether the tests pass. Raises RuntimeError where they neither pass nor fail: pytest then has not run them."""
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    timeout = 600 + 300 * len(tests)
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(tests)}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - {m.name for m in MUTANTS})
    if unknown:
        print(f"no such mutant: {', '.join(unknown)}; there are: {', '.join(m.name for m in MUTANTS)}")
        return 2
    chosen = [m for m in MUTANTS if not names or m.name in names]
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        shutil.copytree(
            ROOT, project, ignore=shutil.ignore_patterns(".venv", ".git", "outputs", "*_cache", "__pycache__")
        )
        tests = sorted({m.test for m in chosen})
        sound = dict.fromkeys(tests, passes(project, *tests))  # all at once, which starts Python once
        if not all(sound.values()):
            sound = {test: passes(project, test) for test in tests}
        failures = 0
        for mutant in chosen:
            path = project / "prunadapt_ds" / mutant.file
            text = path.read_text()
            start = time.monotonic()
            if text.count(mutant.find) != 1:
                verdict = f"NOT APPLIED: the line stands {text.count(mutant.find)} times in {mutant.file}"
            elif not sound[mutant.test]:
                verdict = "NO PROOF: the test fails without the defect too"
            else:
                path.write_text(text.replace(mutant.find, mutant.replace))
                verdict = "SURVIVED" if passes(project, mutant.test) else "caught"
                path.write_text(text)
            failures += verdict != "caught"
            print(f"{verdict:10} {mutant.name:40} {mutant.test}  ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} caught")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
