-- Step 5 of a recovery: the partition serves again. Writes the epoch's mark, its first entry.
--
-- KEYS 1 meta, 2 log of the partition
-- ARGV 1 identity that the fence met
--      2 SQL's watermark
--      3 limit of the backlog, entries
--      4 cold: '0' for a store that has just been made, '' = leave it
--      5 a copy of the report
--
-- Reply  one string:
--   OK mark_id                      the partition serves
--   TAKEN last_id                   somebody else has written under this epoch or a higher one, so that the server would not
--                                   take the mark: begin again under an epoch above last_id. Nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   a dozen calls.
--@include identity
--@include ids
--@include ready_or_fenced
local meta, log, watermark = KEYS[1], KEYS[2], ARGV[2]
local code = refusal(meta, identity(), ARGV[1])
if code then return code end
local prev = last_id(log)
if not id_above(EPOCH .. '-0', prev) then return 'TAKEN ' .. prev end
local m = redis.call('HMGET', meta, 'watermark', 'cold', 'evicted_to', 'prev', 'carry')
if m[1] and id_above(m[1], watermark) then watermark = m[1] end
-- The mark's prev: never below SQL's watermark, so that an older copy of SQL, restored later, shows that it is one.
if id_above(ARGV[2], prev) then prev = ARGV[2] end
local carry = redis.call('XLEN', log) - kept(log, watermark, m[4], m[5])
local time = redis.call('TIME')
local at = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
local mark = redis.call('XADD', log, EPOCH .. '-0', 'e',
  table.concat({ '', '', '0', '@epoch', prev, '', at, OWNER, '', '', '', '', '', '', '0' }, '\31'))
redis.call('HSET', meta, 'identity', ARGV[1], 'watermark', watermark, 'limit', ARGV[3], 'limit_max', ARGV[3], 'limit_at', at,
  'prev', prev, 'carry', carry,
  'cold', ARGV[4] == '0' and '0' or (m[2] or '1'), 'evicted_to', m[3] or '0-0', 'report', ARGV[5],
  'kept', kept(log, watermark, prev, carry), 'status', 'ready')
return 'OK ' .. mark
