-- After a flush was committed: raises the watermarks, sets the brake, trims the logs.
--
-- KEYS   the meta and the log of each partition, in pairs
-- ARGV   for each partition: watermark, entry id to trim to (it stays, as the witness), limit of the backlog (entries)
--
-- Reply  one string, a line per partition:
--   OK trimmed          the watermark only grows; trimmed entries are gone
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   0.1 us an entry trimmed.
--@include identity
--@include ids
--@include ready_or_fenced
local here, lines, time = identity(), {}, redis.call('TIME')
local at = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
for p = 1, #KEYS / 2 do
  local meta, log = KEYS[2 * p - 1], KEYS[2 * p]
  local watermark, trim_to, limit = ARGV[3 * p - 2], ARGV[3 * p - 1], ARGV[3 * p]
  local code = refusal(meta, here, '')
  if code then
    lines[p] = code
  else
    local m = redis.call('HMGET', meta, 'watermark', 'prev', 'carry')
    if id_above(trim_to, watermark) then trim_to = watermark end -- SQL's watermark: what is above it is not in SQL
    if m[1] and id_above(m[1], watermark) then watermark = m[1] end
    local trimmed = redis.call('XTRIM', log, 'MINID', '=', trim_to)
    redis.call('HSET', meta, 'watermark', watermark, 'limit', limit, 'limit_at', at, 'kept', kept(log, watermark, m[2], m[3]))
    lines[p] = 'OK ' .. trimmed
  end
end
return table.concat(lines, '\n')
