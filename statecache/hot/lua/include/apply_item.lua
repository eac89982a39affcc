local fields_max = tonumber(ARGV[3])
-- An instance with more data fields than this has the flag w. Of one without it nothing has to be counted before a patch that
-- could not bring it over the limit: to count costs each item 6 % of its time.
local NARROW_MAX = 64

-- What few items need is made when the first of them does: making a function costs each call a third of a microsecond.
local rare
local function rarely()
--@include order
  -- Whether a partition's log that seems full has room: a brake that no flusher has set again for a while is let go. SQL or the
  -- flusher is away, and that is absorbed.
  local brakes_read = {}
  local function has_room(p)
    if not brakes_read[p] then
      local m = call('HMGET', metas[p], 'limit', 'limit_max', 'limit_at')
      if m[2] and m[3] and at - m[3] > 3000 then rooms[p] = rooms[p] + m[2] - m[1] end
      brakes_read[p] = true
    end
    return rooms[p] > 0
  end

  -- The results of increments as [field, text, ...] and as one JSON object text; or nil and the broken rule.
  local function incremented(key, increments)
    local pairs_, texts = {}, {}
    for n = 1, #increments do
      local field, delta, kind = increments[n][1], increments[n][2], increments[n][3]
      local old = (key and call('HGET', key, field)) or '0'
      local value = tonumber(old)
      if not value or not match(old, '^%-?%d') then return nil, 'number ' .. field end
      local result, text = value + tonumber(delta), nil
      if kind == 'i' and match(old, '^%-?%d+$') then
        if math.abs(result) > 9007199254740991 or math.abs(value) > 9007199254740991 then return nil, 'range ' .. field end
        text = string.format('%.0f', result)
      else
        if math.abs(result) >= 1e300 then return nil, 'range ' .. field end
        text = string.format('%.15g', result)
        if tonumber(text) ~= result then text = string.format('%.17g', result) end
      end
      pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = field, text
      texts[n] = '"' .. field .. '":' .. text
    end
    return pairs_, '{' .. table.concat(texts, ',') .. '}'
  end

  -- Whether a claim keeps an item out: the answer that says so, or nil, and what the flags are from now on. A claim that has
  -- expired ends with the next move of anybody else; its own holder finds out that it is too late.
  local function kept_out(key, flags, token)
    local held = find(flags, 'c', 1, true) and call('HGET', key, '@c')
    if not held then return token ~= '' and 'FENCED - 0', '' end
    local own, until_ms, worker = match(held, '^(%S+) (%d+) %S+ (%S+)$')
    if not own then return 'TYPE' end
    local live = tonumber(until_ms) > tonumber(at)
    if live and token == own then return nil, ' c' end
    if live then return 'FENCED ' .. worker .. ' ' .. until_ms end
    return token ~= '' and 'FENCED - ' .. until_ms, ''
  end

  -- Sets the deadline of a state that has one; leaving such a state takes it away.
  local function note_deadline(p, move, id, from, to)
    local due, name, limit = sub(prefixes[p], 1, -3) .. 'due', move[1] .. ':' .. id, move[5][to]
    if limit then
      call('ZADD', due, string.format('%.0f', at + limit), name)
    elseif move[5][from] then
      call('ZREM', due, name)
    end
  end

  -- A broken rule about the number of fields, or nil. `count` is what it would be if all names were new; they stand in the
  -- arguments of HSET from the fifth on.
  local function too_many(key, count, arguments, last, unset)
    for n = 5, last, 2 do count = count - call('HEXISTS', key, arguments[n]) end
    for n = 1, unset and #unset or 0 do count = count - call('HEXISTS', key, unset[n]) end
    return count > fields_max and ('fields ' .. count) or nil
  end

  rare = {
    has_room = has_room, incremented = incremented, kept_out = kept_out, note_deadline = note_deadline, too_many = too_many,
    id_above = id_above,
  }
  return rare
end

-- The arguments of each shape's HSET behind the key; each item puts its own values in.
local arguments, sizes = { false }, { false }
for shape = 1, #shapes do
  local names = shapes[shape]
  local made = { '@', '', '@r', '', names[1], '', names[2], '', names[3], '', names[4], '', names[5], '', names[6], '' }
  for n = 7, #names do made[2 * n + 3] = names[n] end
  arguments[shape], sizes[shape] = made, #names
end

-- Applies the item at items[i]; `behind` is then the index of the next one. One long function, because handing a dozen values
-- to another one costs an item as much as forty of its own instructions.
local next_id, behind, colds, next_versions = EPOCH .. '-*', 1, {}, {}
local function apply(i)
  local values, p, shape, first, expected, extras = items, items[i], items[i + 5], i + 6, 0, false
  if shape < 0 then shape, first, expected, extras = -shape, i + 8, values[i + 6], values[i + 7] end
  local fields = sizes[shape]
  behind = first + fields
  if refused[p] then return refused[p] end
  local id, move, texts, token, tail = values[i + 1], moves[values[i + 2]], common[values[i + 2]], values[i + 3], values[i + 4]
  local key = prefixes[p] .. texts[1] .. id
  local own = pcall_('HMGET', key, '@', '@r')
  if own.err then return 'TYPE' end
  local now, ring, to, flags, wide, claimed = own[1], own[2], move[3][''], '', false, false
  local from, version, created
  if not now then
    colds[p] = colds[p] or call('HMGET', metas[p], 'cold', 'evicted_to')
    local cold, evicted_to, absent = colds[p][1] or '1', colds[p][2] or '0-0', extras and extras[2] or ''
    if not to or (cold ~= '0' and (absent == '' or (rare or rarely()).id_above(evicted_to, absent))) then
      return 'MISS ' .. cold .. ' ' .. evicted_to
    end
    if rooms[p] <= 0 and not (rare or rarely()).has_room(p) then return 'FULL' end
    if fields > fields_max then return 'DATA fields ' .. fields end
    from, version, created, ring, wide = '', '0', at, token, fields > NARROW_MAX
  else
    from, version, created, flags = match(now, '^(%S+) (%d+) %S+ (%d+) %d+ %d+(.*)$')
    if not from or not ring then return 'TYPE' end
    local place = find(ring, token, 1, true) -- at multiples of 8 only
    while place and place % 8 ~= 1 do place = find(ring, token, place + 1, true) end
    if place then
      call('HSET', key, '@r', ring) -- a WAIT after this call speaks of this write
      local back = (#ring - place - 7) / 8
      return 'DUP ' .. (version - back) .. ' ' .. (back == 0 and match(now, '^%S+ %d+ (%S+)') or '-')
    end
    if extras and extras[1] == 1 and version + 0 > #ring / 8 and expected ~= version + 0 then
      call('HSET', key, '@r', ring) -- it may prove a duplicate: a WAIT after this call speaks of it too
      return 'OLD ' .. version
    end
    if to then return 'EXISTS ' .. version end
    local claim = extras and extras[5] or ''
    if flags ~= '' or claim ~= '' then
      if find(flags, 'p', 1, true) then return 'PARKED' end
      claimed, wide = find(flags, 'c', 1, true), find(flags, 'w', 1, true)
      local answer
      answer, flags = (rare or rarely()).kept_out(key, flags, claim)
      if answer then return answer end
    end
    -- Before the checks of version and state: what follows an item that found no room must not be judged without it.
    if rooms[p] <= 0 and not (rare or rarely()).has_room(p) then return 'FULL' end
    if expected ~= 0 and expected ~= version + 0 then return 'VERSION ' .. version end
    to = move[3][from]
    if not to then return 'STATE ' .. from .. ' ' .. version end
  end

  local set, last, ending = arguments[shape], 6, texts[3]
  for n = first, behind - 1 do
    set[last] = values[n]
    last = last + 2
  end
  last = last - 2
  if now then
    if extras and #extras[4] > 0 then
      local results, text = (rare or rarely()).incremented(key, extras[4])
      if not results then return 'DATA ' .. text end
      set, ending, fields = { unpack(set, 1, last) }, '\31' .. text .. '\31' .. move[4], fields + #results / 2
      for n = 1, #results do set[last + n] = results[n] end
      last = last + #results
    end
    if fields > 0 and (wide or NARROW_MAX + fields > fields_max) then
      local count = call('HLEN', key) - (claimed and 3 or 2) + fields
      local rule = count > fields_max and (rare or rarely()).too_many(key, count, set, last, extras and extras[3])
      if rule then return 'DATA ' .. rule end
    end
    ring = #ring == 64 and sub(ring, 9) .. token or ring .. token
  end

  -- From here on nothing may fail: everything was checked, and a script that may run out of memory was refused at its start.
  -- But XADD, if a stranger's record has a higher id: it comes first.
  local words = texts[5][from]
  if not words then
    words = {
      '\31' .. move[2] .. '\31' .. from .. '\31' .. to .. '\31' .. at .. '\31',
      to .. ' ',
      ' ' .. (from == '' and '-' or from) .. ' ' .. to,
    }
    if several then texts[5][from] = words end
  end
  -- Numbers become text once: each time costs a third of a microsecond. A version has fewer than 14 digits, so `..` may do it,
  -- twice as fast as `%.0f`.
  local next_version = next_versions[version] or (version + 1) .. ''
  if several then next_versions[version] = next_version end
  version = next_version
  local entry_id = call('XADD', logs[p], next_id, 'e', texts[2] .. id .. '\31' .. version .. words[1] .. tail .. ending)
  local mark = flags == '' and ' w' or 'w'
  set[2] = words[2] .. version .. ' ' .. entry_id .. ' ' .. created .. texts[4] .. flags .. (wide and mark or '')
  set[4] = ring
  local new = call('HSET', key, unpack(set, 1, last))
  if claimed and flags == '' then call('HDEL', key, '@c') end
  if extras and #extras[3] > 0 then call('HDEL', key, unpack(extras[3])) end
  if move[5] then (rare or rarely()).note_deadline(p, move, id, from, to) end
  if new > 0 and now and not wide and call('HLEN', key) - (flags == '' and 2 or 3) > NARROW_MAX then
    call('HSET', key, '@', set[2] .. mark)
  end
  rooms[p] = rooms[p] - 1
  return 'OK ' .. version .. ' ' .. entry_id .. words[3]
end
