-- Step 3 of a recovery: what the log holds at SQL's watermark.
--
-- KEYS 1 meta, 2 log of the partition
-- ARGV 1 identity that the fence met; * = a dry run, which has no fence
--      2 SQL's watermark
--
-- Reply  one string:
--   OK first_id last_id length, then the entry at the watermark and the next one behind it, each a line `<id>\31<text>` or -
--   EPOCH | RECOVERING | IDENTITY   not admitted
-- Nothing is written. Cost   half a dozen calls.
--@include identity
--@include ids
--@include ready_or_fenced
local meta, log, watermark = KEYS[1], KEYS[2], ARGV[2]
local code = refusal(meta, identity(), ARGV[1])
if code then return code end
local function line(page)
  local found = page[1]
  if not found then return '-' end
  return found[1] .. '\31' .. ((#found[2] == 2 and found[2][1] == 'e') and found[2][2] or '?')
end
local first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
return table.concat({
  'OK ' .. (first and first[1] or '-') .. ' ' .. last_id(log) .. ' ' .. redis.call('XLEN', log),
  line(redis.call('XRANGE', log, watermark, watermark)),
  line(redis.call('XRANGE', log, '(' .. watermark, '+', 'COUNT', 1)),
}, '\n')
