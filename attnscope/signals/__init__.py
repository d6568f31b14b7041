"""What breaks in training, and when: tables in, events out, without torch. Reading order: nonfinite, alarms, spikes, conditions."""
