"""Imports what most processes of the tests need, for the server that they are forked from."""

import megaopd.engine.student
import megaopd.rollout.embedded
import megaopd.teacher.megatron
import megaopd.train_rollout  # noqa: F401
