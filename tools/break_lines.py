"""Break each line of the privacy contract on purpose and see its test fail.

    python tools/break_lines.py [--only WORD] [--table]

Works on a copy of the package and the tests in a temporary folder. Each entry names the line of the contract, what is broken, how (a text of a
module and what it is replaced by), and the test that must fail; unbroken, all of them must pass. Exit code 1 if a break goes unnoticed. `--table` prints the list in Markdown
without running anything.
"""
import argparse
import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Break:
    line: int | str
    what: str
    module: str
    old: str
    new: str
    test: str

    def broken(self, folder):
        """Source of the broken module."""
        source = (folder / "dpsynth" / f"{self.module}.py").read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise SystemExit(f"error: {self.what}: {self.old!r} occurs {source.count(self.old)} times in {self.module}.py")
        return source.replace(self.old, self.new)

    def apply(self, folder):
        source = self.broken(folder)
        (folder / "dpsynth" / f"{self.module}.py").write_text(source, encoding="utf-8")


BREAKS = [
    Break(1, "the accountant is told more noise than is drawn", "privacy", 'Access("fine-tuning", "dp_sgd", self.noise_multiplier,',
          'Access("fine-tuning", "dp_sgd", 1.1 * self.noise_multiplier,', "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(1, "a given noise multiplier is checked with a tolerance", "privacy", "self.private and self.epsilon > self.target_epsilon",
          "self.private and self.epsilon > 1.01 * self.target_epsilon", "test_privacy_mechanism.py::test_given_noise_multiplier_is_checked_without_tolerance"),
    Break(1, "updates are counted in microbatches", "privacy", "steps = int(settings.epochs * num_units / settings.batch_size)",
          "steps = int(settings.epochs * num_units / settings.microbatch_size)", "test_privacy_mechanism.py::test_steps_are_updates_not_microbatches"),
    Break(1, "the mechanism can be changed after the noise was computed", "privacy", "@dataclasses.dataclass(frozen=True)\nclass Mechanism:",
          "@dataclasses.dataclass\nclass Mechanism:", "test_privacy_mechanism.py::test_mechanism_is_frozen"),
    Break(2, "batches of a fixed size instead of Poisson samples", "privacy", 'units = np.flatnonzero(below(randomness.integers("batch", step, count), self.sampling_probability * self.bands))',
          'units = np.sort(np.argsort(randomness.integers("batch", step, count))[:self.expected_batch_size])', "test_privacy_poisson_sampling.py::test_batch_sizes_vary_and_average_to_the_expected_size"),
    Break(2, "a unit twice in one update", "privacy", "return units[_groups(randomness, count, self.bands)[units] == step % self.bands]",
          "return np.append(units, units[:1])",
          "test_privacy_poisson_sampling.py::test_inclusion_is_binomial_and_at_most_once_per_update"),
    Break(2, "the same sample in every update", "privacy", 'randomness.integers("batch", step,', 'randomness.integers("batch", 0,',
          "test_privacy_poisson_sampling.py::test_inclusion_is_binomial_and_at_most_once_per_update"),
    Break(2, "an empty draw is skipped", "finetune", "        total = self.gradient_sum(self.session.batch())\n",
          "        batch = self.session.batch()\n        if not len(batch):\n            self.session.step += 1\n            return\n"
          "        total = self.gradient_sum(batch)\n", "test_privacy_poisson_sampling.py::test_an_empty_draw_is_an_update_of_pure_noise"),
    Break(2, "division by another number than the expected batch size", "privacy", "(self.grid * self.mechanism.expected_batch_size)",
          "(self.grid * (self.mechanism.expected_batch_size + 1))", "test_privacy_poisson_sampling.py::test_division_is_by_the_expected_batch_size"),
    Break(2, "padding is row 0", "finetune", "constant_values=-1)\n\n# %%", "constant_values=0)\n\n# %%",
          "test_privacy_noise.py::test_neither_the_size_of_microbatches_nor_the_order_changes_a_bit_of_the_sum"),
    Break(3, "δ of 1/n is accepted", "privacy", "if not 0 < delta < 1 / num_units:", "if not 0 < delta < 2 / num_units:",
          "test_privacy_mechanism.py::test_impossible_mechanisms_are_refused"),
    Break(3, "replace-one is claimed to cost what add/remove costs", "certificate", 'epsilon_after(mechanism.steps, "epsilon_replace_one")',
          'epsilon_after(mechanism.steps, "epsilon")', "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(3, "rows are counted where groups are the unit", "finetune", 'else records.public_units + settings.canaries', 'else len(records) + settings.canaries',
          "test_privacy_unit.py::test_a_column_can_be_the_unit"),
    Break(3, "units are chosen among as many as there are rows", "data", "_permutation(len(np.unique(units)), seed", "_permutation(len(units), seed",
          "test_data.py::test_a_unit_of_many_rows_moves_no_other_unit_in_or_out"),
    Break(3, "rows are chosen by position where their number is private", "data", '    if settings.unit_count == "private":\n', "    if False:\n",
          "test_data.py::test_one_more_unit_moves_no_other_where_their_number_is_private"),
    Break(3, "units are dealt by a hash of their name where their number is public", "data", '    if settings.unit_count == "private":\n',
          '    if "unit" in frame or settings.unit_count == "private":\n',
          "test_data.py::test_a_unit_that_is_renamed_stays_where_it_was_and_moves_no_other"),
    Break(3, "the shape of all units follows the largest", "finetune", "np.full((len(groups), most), -1, np.int64)",
          "np.full((len(groups), max(min(len(g), most) for g in groups)), -1, np.int64)", "test_privacy_unit.py::test_rows_of_a_unit_are_chosen_by_the_unit_alone"),
    Break(3, "a group has one gradient for each of its rows", "finetune", "    return losses.sum() / jnp.maximum((total_length > 0).sum(), 1)",
          "    return losses.sum()", "test_privacy_unit.py::test_a_group_has_one_gradient_the_mean_of_its_rows"),
    Break(4, "the loss is averaged over the padded length", "finetune", "/ jnp.maximum(weights.sum(), 1.0)", "/ tokens.shape[0]",
          "test_privacy_per_example_loss.py::test_loss_is_normalised_by_the_rows_own_length"),
    Break(4, "a unit's numbers depend on the units before it", "finetune", "return ([t + e for t, e in zip(sums[0], each)]",
          "return ([t + e + (t >> 10) for t, e in zip(sums[0], each)]",
          "test_privacy_per_example_loss.py::test_gradient_of_a_unit_is_unchanged_by_its_batch_mates"),
    Break(4, "mixtures of experts are accepted", "models", 'name.startswith("router_aux_loss")', 'name.startswith("router_aux_cost")',
          "test_privacy_per_example_loss.py::test_a_mixture_of_experts_is_refused"),
    Break(4, "layers that mix examples are accepted", "models", "(keras.layers.BatchNormalization, keras.layers.SpectralNormalization)",
          "(keras.layers.SpectralNormalization,)", "test_privacy_per_example_loss.py::test_layers_that_mix_examples_are_refused"),
    Break(5, "numbers that are not finite are replaced, and the rest of their unit is used", "finetune", "gradients = [g.astype(jnp.float32) for g in gradients]",
          "gradients = [jnp.nan_to_num(g.astype(jnp.float32)) for g in gradients]",
          "test_privacy_clipping.py::test_unusable_gradients_count_as_zero"),
    Break(5, "rounding to the nearest grid point", "finetune", "jnp.trunc(g * scale)",
          "jnp.round(g * scale)", "test_privacy_clipping.py::test_norm_on_the_grid_never_exceeds_the_bound"),
    Break(5, "no clipping", "finetune", "else jnp.minimum(largest, bound / norm)", "else largest",
          "test_privacy_clipping.py::test_one_extreme_unit_moves_the_sum_by_at_most_the_sensitivity"),
    Break(5, "a norm that misses the squares of small numbers", "finetune", "unit = [jnp.where(usable, g / largest, 0.0) for g in gradients]",
          "unit, largest = [jnp.where(usable, g, 0.0) for g in gradients], 1.0",
          "test_privacy_clipping.py::test_norm_on_the_grid_is_bounded_for_very_small_large_and_many_numbers"),
    Break(6, "the noise does not depend on the secret", "privacy", "hmac.new(self._secret,", "hmac.new(bytes(32),",
          "test_privacy_noise.py::test_noise_is_independent_over_steps_runs_secrets_and_from_batches"),
    Break(6, "the noise does not depend on the run", "privacy", 'f"{self.run_id}|{tag}|{step}"', 'f"{tag}|{step}"',
          "test_privacy_noise.py::test_noise_is_independent_over_steps_runs_secrets_and_from_batches"),
    Break(6, "the same noise in every update", "privacy", 'self._randomness.gaussians("noise", self.step, count)',
          'self._randomness.gaussians("noise", 0, count)', "test_privacy_correlated_noise.py::test_correlated_noise_is_what_the_strategy_makes_of_independent_noise"),
    Break(6, "half the noise", "privacy", "self.mechanism.noise_multiplier * 2.0**self.bits)).astype", "0.5 * self.mechanism.noise_multiplier * 2.0**self.bits)).astype",
          "test_privacy_noise.py::test_noise_has_the_promised_standard_deviation_and_is_normal"),
    Break(6, "noise of few distinct values", "privacy", "return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]",
          "return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float16).astype(np.float64)",
          "test_privacy_noise.py::test_noise_tail_and_resolution"),
    Break(6, "sums in floating point", "finetune", '"int32" if self.private else "float32"', '"float32"', "test_privacy_noise.py::test_sum_is_bit_equal_in_any_order"),
    Break(6, "the secret can be read by others", "privacy", "os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600", "os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644",
          "test_privacy_noise.py::test_secret_is_private_to_its_file"),
    Break(6, "the secret is stored with the identity of the run", "finetune", "randomness = Randomness(secret, bind_run(private, identity, adapter.exists()))",
          'randomness = Randomness(secret, bind_run(private, {**identity, "key": secret.hex()}, adapter.exists()))', "test_privacy_noise.py::test_the_secret_is_in_no_file_outside_private"),
    Break(7, "a training that does not fit is charged first", "finetune", '            if not account.is_charged("training"):\n',
          '            account.charge("training", training_event(mechanism))\n            if True:\n',
          "test_privacy_hard_stop.py::test_what_no_training_can_survive_is_found_before_it_is_charged"),
    Break(8, "the look back takes correlated updates for independent ones", "privacy", "range(steps if bands > 1 else 1)", "range(1)",
          "test_privacy_correlated_noise.py::test_the_look_back_at_the_noise_knows_how_far_updates_are_correlated"),
    Break(9, "units too short to overlap are counted as units that do not", "finetune", "return [found.overlapping, found.long_enough - found.overlapping]",
          "return [found.overlapping, found.rows - found.overlapping]",
          "test_privacy_paid_access.py::test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged"),
    Break(7, "a training without noise passes the look back", "finetune", "    if not abs(session.realised_noise - 1) <= NOISE_ERRORS", "    if not abs(session.realised_noise - 1) <= 1e6",
          "test_privacy_hard_stop.py::test_self_check_finds_missing_noise_missing_updates_and_an_idle_model"),
    Break(7, "an update too few passes the look back", "finetune", "    if session.step != mechanism.steps:\n        raise", "    if session.step > mechanism.steps:\n        raise",
          "test_privacy_hard_stop.py::test_self_check_finds_missing_noise_missing_updates_and_an_idle_model"),
    Break(7, "one update more", "privacy", "if self.step >= self.mechanism.steps:", "if self.step > self.mechanism.steps:",
          "test_privacy_hard_stop.py::test_step_after_the_last_is_refused"),
    Break(7, "a sum is released twice", "privacy", "self._drawn, self.step = None, self.step + 1", "self.step = self.step + 1; self._drawn = self.step",
          "test_privacy_hard_stop.py::test_a_sum_is_released_once"),
    Break(7, "resume draws again", "privacy", 'self.step, self._drawn, self._realised = int(state["step"]), None,',
          'self.step, self._drawn, self._realised = max(0, int(state["step"]) - 1), None,', "test_privacy_hard_stop.py::test_resume_ends_with_the_same_bits"),
    Break(7, "changed settings, data or code may resume", "privacy", "    if changed:\n", "    if not changed and False:\n",
          "test_privacy_hard_stop.py::test_changed_settings_data_or_code_refuse_to_resume"),
    Break(8, "the group of a unit is its position", "privacy", "return units[_groups(randomness, count, self.bands)[units] == step % self.bands]",
          "return units[units % self.bands == step % self.bands]", "test_privacy_correlated_noise.py::test_the_group_of_a_unit_is_random_and_not_its_position"),
    Break(8, "groups do not take turns", "privacy", "return units[_groups(randomness, count, self.bands)[units] == step % self.bands]", "return units",
          "test_privacy_correlated_noise.py::test_with_bands_a_unit_takes_part_at_most_once_in_as_many_updates"),
    Break(8, "bands are accounted as plain DP-SGD", "verify", 'access["sampling_probability"] * access["bands"])', 'access["sampling_probability"])',
          "test_privacy_correlated_noise.py::test_bands_are_accounted_as_fewer_larger_samples_and_chosen_by_public_numbers"),
    Break(8, "earlier noise is forgotten on resume", "privacy", "        self._recent.extend(state", "        list(state",
          "test_privacy_correlated_noise.py::test_bands_resume_with_the_same_bits"),
    Break(9, "counts without noise", "privacy", "return mechanism([int(c) for c in counts])", "return [int(c) for c in counts]",
          "test_privacy_paid_access.py::test_noisy_counts_have_the_promised_noise"),
    Break(9, "counts are not charged", "privacy", "others=tuple(count_accesses(settings).values()))", "others=())", "test_privacy_paid_access.py::test_counts_and_training_together_meet_the_target"),
    Break(9, "counts are drawn again on resume", "finetune", "    if path.exists():\n        return json.loads(path", "    if False:\n        return json.loads(path",
          "test_privacy_paid_access.py::test_counts_are_estimated_once_and_used"),
    Break(9, "one unit decides which rows of another take part", "finetune", "np.random.default_rng([seed, 7, len(g)])",
          "np.random.default_rng([seed, 7, len(units)])", "test_privacy_unit.py::test_rows_of_a_unit_are_chosen_by_the_unit_alone"),
    Break(10, "a run is not charged before it starts", "finetune", '            self.ledger.start(f"{self.run_id} {what}")\n', "", "test_privacy_ledger_of_runs.py::test_a_stopped_run_is_charged"),
    Break(11, "a length of a private row in the certificate", "finetune", "base, account.composed(mechanism), release)",
          'base, {**account.composed(mechanism), "releases": max(map(len, records.texts))}, release)',
          "test_privacy_outputs.py::test_an_outlier_row_changes_no_released_byte_that_is_not_a_dp_output"),
    Break(11, "the loss on private rows is released", "finetune", 'LossLog(private / "losses.jsonl", trainer)', 'LossLog(private.parent / "release" / "losses.jsonl", trainer)',
          "test_privacy_outputs.py::test_monitoring_stays_private_and_is_certified"),
    Break(9, "the number of units after copies were dropped", "data", 'self.source.get("duplicates_dropped", 0))', "0)",
          "test_privacy_outputs.py::test_an_outlier_unit_shows_in_no_file_but_in_dp_outputs"),
    Break(9, "a label outside the public set is passed over", "data", "    _refuse(where, raw.index, settings.label_column, problems)\n", "",
          "test_privacy_outputs.py::test_a_label_outside_the_public_set_stops_the_run_before_anything_is_charged_or_released"),
    Break(9, "an exact number of units that was paid to be hidden", "pipeline", 'if settings.unit_count == "public" else {}\n    record(', 'if True else {}\n    record(',
          "test_privacy_paid_access.py::test_an_exact_number_of_units_that_was_paid_to_be_hidden_is_in_no_file"),
    Break(12, "no mark beside weights without privacy", "finetune", "        mark_not_private(settings, release)", "        pass",
          "test_privacy_not_private.py::test_a_model_trained_without_privacy_says_so_beside_its_weights"),
    Break(12, "a certificate without privacy", "finetune", "        mark_not_private(settings, release)", '        (release / "certificate.json").write_text("{}")',
          "test_privacy_not_private.py::test_without_privacy_there_is_no_certificate"),
    Break(7, "an unfinished run goes on in other microbatches", "privacy", 'free = ("code", "libraries", "computation") if finished else ()',
          'free = ("code", "libraries", "computation") if finished else ("computation",)',
          "test_privacy_hard_stop.py::test_a_run_that_is_not_finished_keeps_its_microbatches_and_devices"),
    Break(7, "a module that decides a release is not in the identity", "privacy", 'NOT_RELEASING = ("cli",', 'NOT_RELEASING = ("demo", "cli",',
          "test_privacy_hard_stop.py::test_every_module_that_decides_a_release_is_in_the_identity_of_a_run"),
    Break(9, "counts are drawn with less noise than is charged", "finetune", "noisy_counts(exact[name](), access.noise_multiplier)",
          "noisy_counts(exact[name](), access.noise_multiplier / 100)",
          "test_privacy_paid_access.py::test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged"),
    Break(9, "the labels of rows are counted where groups are the unit", "finetune", "records.labels[units[:, 0]]", "records.labels",
          "test_privacy_paid_access.py::test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged"),
    Break(9, "overlapping rows are counted where groups are the unit", "finetune", 'pd.Series(records.texts).groupby(records.units).agg("\\n".join)',
          "pd.Series(records.texts)", "test_privacy_paid_access.py::test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged"),
    Break(9, "a unit is in two counts", "finetune", "return [below, len(ours) - below]", "return [below, len(ours)]",
          "test_privacy_paid_access.py::test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged"),
    Break(9, "the count that the training follows from is composed, not added", "privacy", 'added=name == "units")', "added=False)",
          "test_privacy_paid_access.py::test_what_follows_from_the_number_of_units_is_added_to_it_and_not_composed"),
    Break(9, "what is added is added once for a replaced unit, too", "verify", '(1 if claim == "epsilon" else 2)', "1",
          "test_privacy_paid_access.py::test_what_follows_from_the_number_of_units_is_added_to_it_and_not_composed"),
    Break(9, "a certificate may understate what one access cost", "verify", '{**a, "delta": delta}) for a in paid]', '{**a, "delta": delta}) for a in []]',
          "test_privacy_certificate.py::test_a_count_that_is_said_to_be_cheaper_than_it_was_does_not_verify"),
    Break(9, "a certificate with a number of units that nobody paid for verifies", "verify", 'if a["what"] == COUNT] == [True]', 'if a["what"] == COUNT] != []',
          "test_privacy_certificate.py::test_a_number_of_units_that_nobody_paid_for_does_not_verify"),
    Break(8, "a certificate with a sampling probability above 1 verifies", "verify", 'min(a["steps"], (1 + 1e-9) / a["sampling_probability"])', 'a["steps"]',
          "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(8, "a certificate with more bands than updates verifies", "verify", 'min(a["steps"], (1 + 1e-9) / a["sampling_probability"])',
          '(1 + 1e-9) / a["sampling_probability"]', "test_privacy_certificate.py::test_more_bands_than_updates_do_not_verify"),
    Break(9, "a training may pass for a count that is added", "verify", 'a.get("added") and a["mechanism"] != "discrete_laplace"', "False",
          "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(13, "a certificate that its own audit refutes verifies", "certificate", 'audit.get("epsilon_bound", 0) > certificate["epsilon"] and', "False and",
          "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(13, "what cannot be stated is found after the training", "finetune", "            rehearse_certificate(mechanism, settings, base)\n", "",
          "test_privacy_certificate.py::test_what_cannot_be_stated_is_found_before_the_training_is_charged"),
    Break(10, "the ledger composes the count that the training follows from", "ledger", '    if access.get("added"):\n', "    if False:\n",
          "test_privacy_paid_access.py::test_a_cap_between_the_composed_and_the_added_cost_refuses_the_run"),
    Break(10, "the ledger leaves out what is added", "ledger", "return added + float(total", "return float(total",
          "test_privacy_ledger.py::test_caps_and_what_may_be_published_add_what_others_were_chosen_by"),
    Break(10, "what is added is added once for a group and for a replaced unit, too", "ledger", "added = self.neighbours.changes * sum(", "added = sum(",
          "test_privacy_ledger.py::test_a_count_that_others_were_chosen_by_is_added_and_not_composed"),
    Break(9, "a delta that follows from a private number of units", "settings", 'if self.unit_count == "private" and not self.delta:', "if False:",
          "test_privacy_paid_access.py::test_a_private_number_of_units_needs_a_delta_that_does_not_follow_from_it"),
    Break(9, "the preflight tells a number of units that is to be hidden", "finetune", '        if settings.unit_count == "public":\n            raise\n',
          "        raise\n", "test_privacy_paid_access.py::test_before_a_run_nothing_follows_from_a_number_of_units_that_is_to_be_hidden"),
    Break(10, "counts are not charged in the ledger", "finetune", 'account.charge("counts", accesses_event(count_accesses(settings).values()))', "pass",
          "test_privacy_paid_access.py::test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged"),
    Break(10, "a training without privacy is not charged", "finetune", "if mechanism.private else [EXPOSED]", "if mechanism.private else []",
          "test_privacy_ledger_of_runs.py::test_a_run_without_privacy_is_charged_and_certificates_of_the_same_data_say_so"),
    Break(10, "a certificate says nothing of releases without privacy", "ledger", "_count_runs(private) - _count_runs(same), _count_runs(exposed)",
          "_count_runs(private) - _count_runs(same), 0",
          "test_privacy_ledger_of_runs.py::test_a_run_without_privacy_is_charged_and_certificates_of_the_same_data_say_so"),
    Break(10, "a certificate composes runs that protect other units", "ledger", "if release.unit in (unit, UNKNOWN_UNIT)]", "]",
          "test_privacy_ledger_of_runs.py::test_a_certificate_composes_runs_of_its_own_unit_and_counts_the_others"),
    Break(10, "a run that was charged is planned again", "finetune", "return known is not None and known.charged", "return False",
          "test_privacy_ledger_of_runs.py::test_a_run_without_privacy_is_charged_and_certificates_of_the_same_data_say_so"),
    Break(9, "what is released of the labels need not be paid for", "certificate", "and LABELS not in paid", "and False",
          "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(9, "neighbours that do not go with a public number of units", "verify", '("zero-out" in c["adjacency"]) ==', "True or",
          "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
    Break(9, "lost counts are drawn again", "finetune", "if begun and count_accesses(settings)", "if False and count_accesses(settings)",
          "test_privacy_paid_access.py::test_an_exact_number_of_units_that_was_paid_to_be_hidden_is_in_no_file"),
    Break(11, "an interrupted run leaves the times of its updates", "experiments", "        clean()\n        raise", "        raise",
          "test_experiments.py::test_an_interrupted_run_leaves_no_time_of_an_update"),
    Break(11, "the times of cells stay in the notebook", "experiments", 'part.metadata.pop("execution", None)', "pass",
          "test_experiments.py::test_an_interrupted_run_leaves_no_time_of_an_update"),
    Break(5, "a bound that float32 cannot scale", "settings", "ge=1e-6, le=1e6)", "gt=0)",
          "test_settings.py::test_a_clipping_norm_that_float32_cannot_scale_is_refused"),
    Break(10, "a ledger from before units were known forgets its runs", "ledger", "release.unit in (unit, UNKNOWN_UNIT)]", "release.unit == unit]",
          "test_privacy_ledger.py::test_a_ledger_that_knew_no_units_keeps_its_runs_and_caps"),
    Break(10, "a ledger that is gone is made anew", "ledger", "        if used:\n            raise", "        if False:\n            raise",
          "test_privacy_ledger.py::test_a_ledger_whose_making_was_cut_short_is_made"),
    Break(13, "a folder passes for a published model", "certificate", 'known = name == "tiny" or not pathlib.Path(name).exists()', "known = True",
          "test_privacy_certificate.py::test_what_is_known_of_a_base_model_belongs_to_its_exact_name"),
    Break(13, "a fetched base model has no hash", "finetune", "    return digest.hexdigest()\n\n\ndef processor", '    return "none"\n\n\ndef processor',
          "test_privacy_base_model.py::test_a_model_without_files_here_is_known_by_its_arrays"),
    Break(13, "the page leaves out a part of the certificate", "certificate", '("packing", c["packing"]), ', "",
          "test_privacy_certificate.py::test_page_and_card_say_all_that_the_json_says"),
    Break("§4", "what two units have counts as one's own", "words", "    alone = holders(hashes, owners) == 1\n", "    alone = holders(hashes, owners) >= 1\n",
          "test_audit_words.py::test_what_two_units_have_is_nobodys_own"),
    Break("§4", "training units are compared as if half of the units had been trained on", "audit", "float(stats.hypergeom.sf(a - 1, train + held, a + b, train))",
          "float(stats.binom.sf(a - 1, a + b, 0.5))", "test_audit_words.py::test_names_and_numbers_that_come_from_everybody_alike_are_no_leak"),
    Break("§4", "what occurs of held-out rows is not counted", "audit", "x, y = int(hits[member].sum()), int(hits[~member].sum())",
          "x, y = int(hits[member].sum()), 0", "test_audit_words.py::test_names_and_numbers_that_come_from_everybody_alike_are_no_leak"),
    Break("§4", "a text is its own near copy", "words", "            common.data[owners[rows] == owners[common.indices]] = 0\n", "            pass\n",
          "test_audit_words.py::test_near_copies_are_measured_by_the_texts_of_other_units"),
    Break("§4", "the other rows of a unit are not searched", "audit", "        kept = row_of[names] >= 0", "        kept = np.isin(np.arange(len(names)), ours)",
          "test_audit_words.py::test_all_rows_of_a_unit_are_searched_and_the_unit_counts_once"),
    Break("§4", "an attack is not counted in the level", "audit", "p[order] * np.arange(len(p), 0, -1)", "p[order] * np.maximum(np.arange(len(p), 0, -1) - 4, 1)",
          "test_audit_words.py::test_the_level_of_all_attacks_together_counts_the_new_ones"),
    Break("§4", "the verdict names a share that does not follow from the rows", "audit", "    seen = None if needed is None else _rate_seen(needed, base, train)\n",
          "    seen = 0.01\n", "test_audit_words.py::test_the_smallest_share_that_is_seen_follows_from_the_rows_and_the_level"),
    Break("§4", "a pass says nothing of what could not have been seen", "audit", "at level {self.level:g}. {self.unseen}\"", "at level {self.level:g}.\"",
          "test_audit_words.py::test_the_verdict_says_what_could_not_have_been_seen"),
    Break("§4", "honest audits of rows fail one time in four", "audit", "LEVEL = 0.01  #", "LEVEL = 0.05  #",
          "test_privacy_audit.py::test_twenty_honest_audits_of_rows_pass_with_a_probability_of_four_in_five"),
    Break("§4", "infinite numbers are audited", "audit", "frame[name].abs() > LARGEST", "frame[name].abs() > np.inf",
          "test_audit_words.py::test_infinite_and_huge_numbers_are_refused_and_the_file_the_column_and_the_row_are_named"),
    Break(13, "the base model is not named", "certificate", '"base_model": base, ', "", "test_privacy_certificate.py::test_certificate_verifies_and_a_false_one_does_not"),
]


def noticed(item):
    """Whether the test of a break fails on a broken copy, and the last line that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for part in ("dpsynth", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        item.apply(folder)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{item.test}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seen = re.search(r"^E\s+(assert|AssertionError|Failed: DID NOT RAISE|dpsynth\.settings\.\w+Error)", done.stdout, re.M)  # and not a crash
        return done.returncode == 1 and seen is not None, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]


def table():
    rows = "\n".join(f"| {b.line} | {b.what} | `{b.test.split('::')[1]}` |" for b in BREAKS)
    return f"| line | broken on purpose | test that fails |\n|---|---|---|\n{rows}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="breaks whose description or module has this word")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return 0
    for item in BREAKS:
        item.broken(ROOT)  # a break whose text is gone is found before the first test
    chosen = [item for item in BREAKS if args.only in f"{item.line} {item.what} {item.module}"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted({f"tests/{item.test}" for item in chosen})], cwd=ROOT, check=True)
    missed = 0
    for item in chosen:
        seen, last = noticed(item)
        missed += not seen
        print(f"{'noticed' if seen else 'MISSED '}  {item.line:2}  {item.what}  ({last})", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
