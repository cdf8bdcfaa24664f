#!/usr/bin/env python3
"""What gpu_results.py makes of its inputs: an error, a test that did not end, or a loss that is off is never lost."""

import contextlib
import io
import json
import pathlib
import tempfile
import unittest

import gpu_results

HEAD = "========= COMPUTE-SANITIZER\n"
CLEAN = HEAD + "[       OK ] A.One (3 ms)\n[       OK ] A.Two/x, where GetParam() = y (4 ms)\n========= ERROR SUMMARY: 0 errors\n"


class Sanitizers(unittest.TestCase):
    def of(self, *logs):
        """The result of logs of one tool, (text, names of the tests asked for), and the exit code."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = []
            for n, (text, asked) in enumerate(logs):
                path = pathlib.Path(folder, f"{n}.log")
                path.write_text(f"{text}asked for: {asked}\n")
                arguments.append(f"tool={path}")
            out = pathlib.Path(folder, "out.json")
            with contextlib.redirect_stdout(io.StringIO()):
                code = gpu_results.sanitizers(out, *arguments)
            return json.loads(out.read_text())["tools"]["tool"], code

    def test_nothing_found(self):
        tool, code = self.of((CLEAN, "A.One:A.Two/x"))
        self.assertEqual((tool["tests"], tool["not_ended"], tool["failed"], code), (2, [], [], 0))

    def test_an_error_of_ours(self):
        error = "========= Invalid read\n=========     at void kernels::cuda::<unnamed>::draw<int>(int)+0x10 in a.cu:5\n"
        tool, code = self.of((HEAD + error + CLEAN.replace("0 errors", "1 error"), "A.One"))
        self.assertEqual((tool["errors"], tool["not_printed"], code), (1, 0, 1))

    def test_a_race_of_ours_and_a_warning(self):
        race = "========= {}: Race reported between Write access at kernels::cuda::f(int)+0x10 in a.cu:5\n=========     and Read access at g\n"
        text = CLEAN + race.format("Error") + race.format("Warning") + "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
        tool, code = self.of((text, "A.One"))
        self.assertEqual((tool["errors"], tool["warnings"], tool["not_printed"], code), (1, 1, 0, 1))

    def test_an_error_of_a_library(self):
        error = "========= Barrier error\n=========     at cudnn_kernel+0x10\n"
        tool, code = self.of((error + CLEAN.replace("0 errors", "1 error"), "A.One"))
        self.assertEqual((tool["errors"], tool["in_libraries"], code), (0, {"cudnn_kernel": 1}, 0))

    def test_errors_that_were_not_printed(self):
        tool, code = self.of((CLEAN.replace("0 errors", "1,200 errors"), "A.One"))
        self.assertEqual((tool["not_printed"], code), (1200, 1))

    def test_memory_refused_is_asked_for_and_other_refusals_are_not(self):
        call = "========= Program hit {} on CUDA API call to cudaMalloc.\n"
        text = call.format("cudaErrorMemoryAllocation") + call.format("cudaErrorInvalidValue") + CLEAN.replace("0 errors", "2 errors")
        tool, code = self.of((text, "A.One"))
        self.assertEqual((tool["of_the_host"], tool["not_printed"], code), (1, 0, 1))

    def test_a_test_that_failed_or_did_not_end(self):
        cut = HEAD + "[  FAILED  ] A.One (3 ms)\n[ RUN      ] A.Two\n"
        tool, code = self.of((cut, "A.One:A.Two:A.Three"))
        self.assertEqual((tool["failed"], tool["not_ended"], code), (["A.One"], ["A.Three", "A.Two"], 1))
        tool, code = self.of((cut, "A.One:A.Two:A.Three"), (CLEAN, "A.One"))
        self.assertEqual((tool["failed"], code), (["A.One"], 1), "another run that ends does not make it good")

    def test_what_another_run_ended_is_ended(self):
        tool, code = self.of((HEAD, "A.One:A.Two/x"), (CLEAN, "A.One:A.Two/x"))
        self.assertEqual((tool["tests"], tool["not_ended"], code), (2, [], 0))


class Losses(unittest.TestCase):
    def of(self, half, full, peer_half, peer_full):
        """The largest differences, and the exit code."""
        with tempfile.TemporaryDirectory() as folder:
            files = [pathlib.Path(folder, name) for name in ("half", "full", "peer")]
            for path, losses in zip(files, (half, full)):
                path.write_text("".join(json.dumps({"step": 1, "loss": x, "skipped": False}) + "\n" for x in losses))
            rows = [{"precision": p, "losses": x, "versions": {}} for p, x in (("fp16", peer_half), ("fp32", peer_full))]
            files[2].write_text("".join(json.dumps(row) + "\n" for row in rows))
            out = pathlib.Path(folder, "out.json")
            with contextlib.redirect_stdout(io.StringIO()):
                code = gpu_results.losses(out, *files)
            return json.loads(out.read_text())["largest_relative_difference"], code

    def test_what_agrees(self):
        self.assertEqual(self.of([10.01, 9.0], [10.0, 9.0], [10.0, 9.01], [10.0, 9.0])[1], 0)

    def test_a_peer_whose_fp16_is_far_off_excuses_nothing(self):
        off = [10.0, 12.0]
        self.assertEqual(self.of([10.0, 9.0], [10.0, 9.0], off, [10.0, 9.0])[1], 0)
        differences, code = self.of([10.0, 9.0], [10.0, 9.02], off, [10.0, 9.0])
        self.assertEqual((round(differences["fp32"], 5), code), (0.00222, 1))
        differences, code = self.of([10.0, 9.2], [10.0, 9.0], off, [10.0, 9.0])
        self.assertEqual((round(differences["fp16 beside fp32"], 4), code), (0.0222, 1))


if __name__ == "__main__":
    unittest.main()
