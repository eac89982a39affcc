-- Step 2 of a recovery: from here on nothing of an older epoch changes this partition.
--
-- KEYS 1 meta of the partition
-- ARGV 1 deployment, 2 protocol, 3 partition count: written where there is no meta, compared where there is
--      4 '1': a dry run, which answers the same and writes nothing
--
-- Reply  one string:
--   OK existed epoch owner watermark cold evicted_to, then a line with the recorded identity, then one with the identity
--      met: fenced. Identity, watermark, cold and evicted_to are left as they were (- if not set)
--   NEWER epoch owner     the partition has this epoch or a higher one: nothing written
--   FOREIGN what theirs   another deployment, protocol or partition count lives here: nothing written
-- Cost   a dozen calls.
--@include identity
local meta = KEYS[1]
local m = redis.call('HMGET', meta, 'epoch', 'owner', 'watermark', 'cold', 'evicted_to', 'identity', 'deployment', 'protocol',
  'partitions')
if m[7] and m[7] ~= ARGV[1] then return 'FOREIGN deployment ' .. m[7] end
if m[8] and m[8] ~= ARGV[2] then return 'FOREIGN protocol ' .. m[8] end
if m[9] and m[9] ~= ARGV[3] then return 'FOREIGN partitions ' .. m[9] end
if m[1] and tonumber(m[1]) >= tonumber(EPOCH) then return 'NEWER ' .. m[1] .. ' ' .. (m[2] or '-') end
if ARGV[4] ~= '1' then
  redis.call('HSET', meta, 'epoch', EPOCH, 'owner', OWNER, 'status', 'recovering', 'deployment', ARGV[1], 'protocol',
    ARGV[2], 'partitions', ARGV[3])
end
local fields = { 'OK', m[1] and 1 or 0, m[1] or '0', m[2] or '-', m[3] or '-', m[4] or '-', m[5] or '-' }
return table.concat(fields, ' ') .. '\n' .. (m[6] or '-') .. '\n' .. identity()
