-- A recovery drops the hot copies of instances that SQL knows better, and marks the partition cold.
--
-- KEYS 1 meta of the partition. Instance keys are built from its prefix and lie in the same slot.
-- ARGV 1 identity that the fence met
--      2 entry id up to which instances are cold now
--      3 a JSON array of "machine:id"; may be empty
--
-- Reply  one string:
--   OK dropped                      so many keys are gone
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 1 us an instance.
--@include identity
--@include ids
--@include ready_or_fenced
local meta, evicted_to = KEYS[1], ARGV[2]
local code = refusal(meta, identity(), ARGV[1])
if code then return code end
local old = redis.call('HGET', meta, 'evicted_to') or '0-0'
if id_above(old, evicted_to) then evicted_to = old end
redis.call('HSET', meta, 'cold', '1', 'evicted_to', evicted_to)
local prefix, dropped = string.sub(meta, 1, -5) .. 'i:', 0
for _, name in ipairs(cjson.decode(ARGV[3])) do dropped = dropped + redis.call('UNLINK', prefix .. name) end
return 'OK ' .. dropped
