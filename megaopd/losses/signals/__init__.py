"""The loss of a micro-batch's tokens, one module for each kind of `megaopd.batch.TeacherSignal`."""
