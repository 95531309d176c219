-- Who may say what in the audit log. Run as syncward_owner.

-- What a verifier believes is signed, but an unsigned claim of a worker would look like an attack for
-- ever: only the sealer speaks of itself, and an auditor of reading. An operator is an auditor, too.
ALTER POLICY append ON audit.event WITH CHECK (action NOT IN (
  'signer.rotated', 'audit.epoch_started', 'audit.pruned', 'sealer.started', 'audit.heartbeat'));
ALTER POLICY append_of_audit ON audit.event TO syncward_auditor WITH CHECK (action IN (
  'audit.read', 'audit.verified', 'audit.exported'));
CREATE POLICY append_of_sealer ON audit.event FOR INSERT TO syncward_sealer WITH CHECK (true);

-- No field of an event is longer than a verifier reads, whoever writes it.
ALTER TABLE audit.event ADD CONSTRAINT event_sizes
  CHECK (octet_length(action) <= 100 AND octet_length(target_kind) <= 100);
