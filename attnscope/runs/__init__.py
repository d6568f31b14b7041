"""The run directory: what torch code writes and everything that explains a run reads, without torch.

Reading order: layout (the format on disk, whole), writer, part_writer, reader, members and outcome (how a member ended),
listing (many runs), checkpoint, snapshot and environment (the three modules here that need torch). Behind them: streams (one
Arrow file), checksums, holder (who writes), manifest (run.json), foreign (what a directory that somebody else made may not
do), atomic (a file appears whole or not at all).
"""
