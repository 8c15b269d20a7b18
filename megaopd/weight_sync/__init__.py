"""Ways to bring the student's weights into a rollout engine."""
