"""The run directory: what torch code writes and everything that explains a run reads, without torch.

Reading order: layout (the format on disk, whole), writer, reader, outcome (how a member ended), checkpoint and snapshot (the
two modules here that need torch). Behind them: streams (one Arrow file), checksums, holder (who writes), manifest (run.json), foreign (what a directory
that somebody else made may not do), atomic (a file appears whole or not at all).
"""
