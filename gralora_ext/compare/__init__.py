# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext compare`` and ``gralora-ext analyze``: training runs by the job of ``finetune``, and what they show.

One run is one process and one JSON file (``worker.py``); ``runner.py`` starts those that are not there yet.
"""
