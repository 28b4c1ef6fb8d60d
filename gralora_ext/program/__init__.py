# SPDX-License-Identifier: Apache-2.0
"""What our programs have in common, the job and the benchmarks: errors in one sentence, files written whole, signals, a console."""
